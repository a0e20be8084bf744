"""What cheaper prefixes do to training: held-out gain on nano at equal device time, over seeds.

    python bench/cheaper.py [--seeds 0 1 2] [--only plain ...] [--steps 40] [--device cuda] [--devices 0 1] [--jobs 6]

Every arm samples with 12 steps, the last two with gradient, so that there is a prefix to save; 64 videos a step and the
learning rate that the study chose for such late windows, since with the 16 and 1e-3 of configs/nano.yaml plain gains
too little to tell another arm from it. It trains for as many optimizer steps as fit into the time of --steps steps of
"plain", each arm's step timed alone on a device, and is judged on videos of all 12 steps. `python bench/tables.py` then
fills docs/performance.md.

Prediction: rollouts that are used again give the most gradients for their time, and lose little of the gain at 4 uses;
fewer steps change the videos most, second-order ones less; kept guidance and a merged copy are hard to tell from plain.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before this folder, which has a rewards.py
from nano_study import arguments, opened, run_of
from study_arms import ROOT

RESULT = ROOT / "bench" / "results" / "cheaper.json"
SEEDS = [0, 1, 2]
RECIPE = {"num_inference_steps": 12, "num_grad_steps": 2, "per_device_train_batch_size": 64, "learning_rate": 3e-3}
FLAGS = tuple(word for key, value in RECIPE.items() for word in (f"--{key}", str(value)))
ARMS = {
    "plain": {},
    "merged copy": {"sampling_weights": "merged"},
    "float8 copy": {"sampling_weights": "float8"},
    "half the steps": {"prefix_steps": 5},
    "half the steps, second order": {"prefix_steps": 5, "second_order_prefix": True},
    "guidance every 2nd step": {"guidance_every": 2},
    "rollouts used 2 times": {"rollout_uses": 2},
    "rollouts used 4 times": {"rollout_uses": 4},
    "rollouts used 8 times": {"rollout_uses": 8},
    "all of them": {
        "sampling_weights": "merged",
        "prefix_steps": 5,
        "second_order_prefix": True,
        "guidance_every": 2,
        "rollout_uses": 4,
    },
}


def main(argv: list[str] | None = None) -> None:
    given = arguments(__doc__.splitlines()[0], list(ARMS), 40).parse_args(argv)
    with opened(given, RESULT, ARMS["plain"], flags=FLAGS) as study:
        study.calibrate([ARMS[arm] for arm in given.only])
        seeds = given.seeds or SEEDS
        study.run([run_of(study, {"arm": arm, "seed": seed}, ARMS[arm]) for seed in seeds for arm in given.only])


if __name__ == "__main__":
    main()
