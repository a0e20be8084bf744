"""Held-out gains of cheaper steps on nano at equal device time of the full-size model, over seeds.

    python bench/cheaper.py [--seeds 0 1 2] [--only plain ...] [--steps 40] [--timed 2]
        [--device cuda] [--devices 0 1] [--jobs 6]

Every arm samples with 12 steps, the last two with gradient, so that there is a prefix to save; 64
videos a step and the learning rate that the study chose for such late windows, since with the 16
and 1e-3 of configs/nano.yaml plain gains too little to tell another arm from it. It trains for as
many optimizer steps as the full-size model makes in the time of --steps exact ones, by the seconds
of a gradient in bench/results/step.json (33 frames, 25 steps). All videos are judged with 12 steps.
`python bench/tables.py` fills bench/results/cheaper.md.

nano is so small that launching operators takes most of its time, so its own times say nothing about
the full-size model's.

Prediction: fewer steps before the window give the most; together they beat plain in every seed; the
gradient of the text branch alone loses more than its time gains.
"""

import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import study_runs
from nano_study import arguments, opened
from step_arms import EXACT_BEST, FA3, TOGETHER
from study_arms import ROOT

RESULT, STEP = (ROOT / "bench" / "results" / name for name in ("cheaper.json", "step.json"))
SEEDS = [0, 1, 2]
RECIPE = {"num_inference_steps": 12, "num_grad_steps": 2, "per_device_train_batch_size": 64, "learning_rate": 3e-3}
FLAGS = tuple(word for key, value in RECIPE.items() for word in (f"--{key}", str(value)))
CHEAP = {"prefix_steps": 3, "rollout_reuse": 4}  # 3 of 10 steps before the window
ARMS = {  # but for plain: name in bench/step_arms.py
    "plain": {},
    "half the steps": {"prefix_steps": 5},
    "rollouts used 4 times": {"rollout_reuse": 4},
    "gradient of the text branch": {"guidance_gradient": "none"},
    "a quarter of the steps": {"prefix_steps": 3},
    f"{TOGETHER}{FA3}": CHEAP,
    f"{TOGETHER}, gradient of the text branch{FA3}": CHEAP | {"guidance_gradient": "none"},
    f"{TOGETHER.replace('4', '6')}{FA3}": CHEAP | {"rollout_reuse": 6},
    f"{TOGETHER.replace('4', '8')}{FA3}": CHEAP | {"rollout_reuse": 8},
}


def steps_at_full_size(plain_steps: int) -> dict[str, int]:
    """Return by arm the optimizer steps in the time of `plain_steps` exact ones at full size.

    An arm with FlashAttention-3 is held against the fastest exact arm with it, the others against
    the fastest without. Arms that bench/step.py has not measured are left out.
    """
    rows = [row for row in json.loads(STEP.read_text())["rows"] if row["phase"] == "step"]
    seconds = {row["arm"]: row["seconds_per_gradient"] for row in rows if (row["frames"], row["scored"]) == (33, 1)}
    exact = {True: seconds[EXACT_BEST], False: seconds[EXACT_BEST.partition(FA3)[0]]}
    found = {arm: round(plain_steps * exact[FA3 in arm] / seconds[arm]) for arm in ARMS if arm in seconds}
    return {"plain": plain_steps} | found


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    given = arguments(__doc__.splitlines()[0], [*steps_at_full_size(1)], 40).parse_args(argv)
    steps = steps_at_full_size(given.steps)
    with opened(given, RESULT, ARMS["plain"], flags=FLAGS) as study:
        study.calibrate([])
        tasks = []
        for seed in given.seeds or SEEDS:
            for arm in given.only:
                about = {"arm": arm, "seed": seed, "settings": ARMS[arm], "steps": steps[arm]}
                tasks.append((about, partial(study_runs.train, ARMS[arm], seed, steps[arm], study.conditions)))
        study.run(tasks)


if __name__ == "__main__":
    main()
