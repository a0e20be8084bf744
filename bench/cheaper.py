"""Held-out gains of cheaper prefixes on nano at equal device time, over seeds.

    python bench/cheaper.py [--seeds 0 1 2] [--only plain ...] [--steps 40] [--device cuda]
        [--devices 0 1] [--jobs 6]

Every arm samples with 12 steps, the last two with gradient, so that there is a prefix to save; 64
videos a step and the learning rate that the study chose for such late windows, since with the 16
and 1e-3 of configs/nano.yaml plain gains too little to tell another arm from it. It trains for as
many optimizer steps as fit into the time of --steps steps of "plain", each arm's step timed alone
on a device, and is judged on videos of all 12 steps. nano is so small that calling operators takes
most of its time; arms whose name ends with "at full size's prices" have as many steps as the
seconds of a gradient in bench/results/step.json allow (33 frames, 25 steps). `python
bench/tables.py` fills docs/performance.md.

Prediction: rollouts that are used again give the most gradients for their time, and lose little of
the gain at 4 uses; fewer steps change the videos most; kept guidance and a float8 copy are hard to
tell from plain.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from nano_study import arguments, opened, run_of
from study_arms import ROOT
from study_numbers import AT_FULL_SIZE

RESULT, STEP = (ROOT / "bench" / "results" / name for name in ("cheaper.json", "step.json"))
PLAIN = "exact, nothing twice, compiled"
SEEDS = [0, 1, 2]
RECIPE = {"num_inference_steps": 12, "num_grad_steps": 2, "per_device_train_batch_size": 64, "learning_rate": 3e-3}
FLAGS = tuple(word for key, value in RECIPE.items() for word in (f"--{key}", str(value)))
TOGETHER = "half the steps, guidance every 2nd step, rollouts used 4 times"
ARMS = {
    "plain": {},
    "float8 copy": {"sampling_weights": "float8"},
    "half the steps": {"prefix_steps": 5},
    "guidance every 2nd step": {"guidance_every": 2},
    "rollouts used 2 times": {"rollout_reuse": 2},
    "rollouts used 4 times": {"rollout_reuse": 4},
    "rollouts used 8 times": {"rollout_reuse": 8},
    TOGETHER: {"prefix_steps": 5, "guidance_every": 2, "rollout_reuse": 4},
}


def full_size_prices() -> dict[str, float]:
    """Seconds of a gradient at full size, plain's being 1, of the arms that were measured there."""
    rows = [row for row in json.loads(STEP.read_text())["rows"] if row["phase"] == "step"]
    seconds = {row["arm"]: row["seconds_per_gradient"] for row in rows if (row["frames"], row["scored"]) == (33, 1)}
    return {arm: seconds[arm] / seconds[PLAIN] for arm in ARMS if arm in seconds}


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    prices = {arm + AT_FULL_SIZE: price for arm, price in full_size_prices().items()}
    given = arguments(__doc__.splitlines()[0], [*ARMS, *prices], 40).parse_args(argv)
    settings = {arm: ARMS[arm.removesuffix(AT_FULL_SIZE)] for arm in given.only}
    steps = {arm: round(given.steps / prices[arm]) for arm in given.only if arm in prices}
    with opened(given, RESULT, ARMS["plain"], flags=FLAGS) as study:
        study.calibrate([*settings.values()])
        pairs = [({"arm": arm, "seed": seed}, arm) for seed in given.seeds or SEEDS for arm in given.only]
        study.run([run_of(study, about, settings[arm], steps.get(arm)) for about, arm in pairs])


if __name__ == "__main__":
    main()
