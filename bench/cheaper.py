"""What cheaper prefixes do to training: held-out gain on nano at equal device time, over seeds.

    python bench/cheaper.py [--seeds 0 1 2] [--arms plain ...] [--steps 60] [--jobs 1] [--device cuda]

Every arm samples with 12 steps, the last two with gradient, so that there is a prefix to save. It trains for as many
optimizer steps as fit into the time of --steps steps of "plain": each arm's step is timed first, in a run of its own.
Runs lie in bench/runs/cheaper; after each one bench/results/cheaper.json is written anew from all that are done.

Prediction: rollouts that are used again give the most gradients for their time, and lose little of the gain at 4 uses;
fewer steps change the videos most, second-order ones less; kept guidance and a merged copy are hard to tell from plain.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before this folder, which has a rewards.py
from nano_runs import Study

from rlhf.device import pick_device

WINDOW = {"num_inference_steps": 12, "num_grad_steps": 2}
TIMED = 8  # a multiple of how often any arm uses a rollout
ARMS = {
    "plain": WINDOW,
    "merged copy": WINDOW | {"sampling_weights": "merged"},
    "float8 copy": WINDOW | {"sampling_weights": "float8"},
    "half the steps": WINDOW | {"prefix_steps": 5},
    "half the steps, second order": WINDOW | {"prefix_steps": 5, "second_order_prefix": True},
    "guidance every 2nd step": WINDOW | {"guidance_every": 2},
    "rollouts used 2 times": WINDOW | {"rollout_uses": 2},
    "rollouts used 4 times": WINDOW | {"rollout_uses": 4},
    "rollouts used 8 times": WINDOW | {"rollout_uses": 8},
    "all of them": WINDOW
    | {
        "sampling_weights": "merged",
        "prefix_steps": 5,
        "second_order_prefix": True,
        "guidance_every": 2,
        "rollout_uses": 4,
    },
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of the plain arm (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--device", help="kind of device; default: the accelerator of this machine")
    arguments = parser.parse_args(argv)
    device, study = pick_device(arguments.device), Study("cheaper", ARMS)
    seconds = {
        arm: study.seconds_per_step(arm, device.type, TIMED) for arm in {"plain": 0} | dict.fromkeys(arguments.arms)
    }
    budget = arguments.steps * seconds["plain"]
    about = {"training_seconds": budget, "seconds_per_step": seconds}

    def flags_of(arm: str) -> list[str]:
        return ["--max_steps", str(round(budget / seconds[arm])), "--sample_steps", "0"]

    study.train_all(arguments.arms, arguments.seeds, arguments.jobs, device, flags_of, about)


if __name__ == "__main__":
    main()
