"""Recipes of the main job on a GPU: which one keeps diversity at the same gain?

    python bench/main_job.py [--seeds 100 101 ...] [--only ARM ...] [--device cuda]
        [--devices 0 1] [--jobs 10]

Each arm changes the study's `first two steps`, and takes about as many passes in all. Runs of equal
settings differ widely in diversity, so five or ten seeds of each are made. The prompts are neither
those of README's rows, which bench/main_job_cpu.py measures, nor the study's. Writes
bench/results/main_job.json.

Prediction: a smaller rate loses less diversity and gains less; a little drift control keeps more
diversity than a smaller rate at the same gain; cosine changes nothing. Found: a smaller rate gains
as much; drift control loses less diversity, though not significantly. Of a cap it was predicted
that it spares the videos that are right, and of adjoint matching that it keeps most: the first does
not, the second does, and gains less. Drift control of the negative branch was predicted to keep
diversity at the same gain: weights of .1 and .5 do, .25 less. Arms of other ranks, layers and steps
have no prediction.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import study_runs
from md_table import table
from nano_study import arguments, opened
from study_arms import FIRST_STEPS, ROOT, TWO_REWARDS, changed
from study_numbers import by_arm, gains, mean_interval
from study_report import cell, form_of

from rlhf.adapter.lora import ATTENTION

RESULT = ROOT / "bench" / "results" / "main_job.json"
SEEDS, EVAL_SEED, STEPS = [*range(100, 110)], 14, 140
DRIFT_AND_NORM = {"drift_weight": 0.1, "max_grad_norm": 0.2}
MORE_DRIFT = DRIFT_AND_NORM | {"drift_weight": 0.2, "learning_rate": 3e-3}
ADJOINT = {"method": "adjoint_matching", "learning_rate": 3e-3}
ADJOINT_SCALED = [ADJOINT | {"method_kwargs": {"reward_scale": c}} for c in (1.0, 2.0, 3.0)]
NEGATIVE_DRIFT = {w: {"max_grad_norm": 0.2, "method_kwargs": {"negative_drift_weight": w}} for w in (0.1, 0.25, 0.5)}
SHIPPED = "norm .2"  # configs/nano.yaml
TEXT, VIDEO = ATTENTION[4:], ATTENTION[:4]
ARMS = {  # settings, and steps for about the first arm's time by counts of passes, not timed
    "first two steps": ({}, STEPS),
    "rate 2e-3": ({"learning_rate": 2e-3}, STEPS),
    "rate 3e-3": ({"learning_rate": 3e-3}, STEPS),
    "cosine": ({"lr_scheduler_type": "cosine"}, STEPS),
    "average of .9": ({"ema_decay": 0.9}, STEPS),
    SHIPPED: ({"max_grad_norm": 0.2}, STEPS),
    "norm .1": ({"max_grad_norm": 0.1}, STEPS),
    "norm .2, rate 2e-3": ({"max_grad_norm": 0.2, "learning_rate": 2e-3}, STEPS),
    **{f"negative drift {weight:g}, norm .2": (change, 125) for weight, change in NEGATIVE_DRIFT.items()},
    "negative drift 0.5, norm .2, rate 3.5e-3": (NEGATIVE_DRIFT[0.5] | {"learning_rate": 3.5e-3}, 125),
    "negative drift 0.5, norm .3": (NEGATIVE_DRIFT[0.5] | {"max_grad_norm": 0.3}, 125),
    "drift .1": ({"drift_weight": 0.1}, 105),
    "drift .3": ({"drift_weight": 0.3}, 105),
    "drift .3, rate 3e-3": ({"drift_weight": 0.3, "learning_rate": 3e-3}, 105),
    "drift .1, norm .2": (DRIFT_AND_NORM, 105),
    "drift .1, norm .2, 125 steps": (DRIFT_AND_NORM, 125),
    "drift .1, norm .2, rate 3e-3": (DRIFT_AND_NORM | {"learning_rate": 3e-3}, 105),
    "drift .2, norm .2, rate 3e-3": (MORE_DRIFT, 105),
    "drift .2, norm .2, rate 3e-3, 125 steps": (MORE_DRIFT, 125),
    "rate 2e-3, drift .05": ({"learning_rate": 2e-3, "drift_weight": 0.05}, 110),
    "cap of .7": ({"reward_caps": {"nano_preference": 0.7}}, STEPS),
    "cap of .75": ({"reward_caps": {"nano_preference": 0.75}}, STEPS),
    "cap of .8": ({"reward_caps": {"nano_preference": 0.8}}, STEPS),
    "cap of .75, drift .1, norm .2": (DRIFT_AND_NORM | {"reward_caps": {"nano_preference": 0.75}}, 110),
    "adjoint matching": (ADJOINT_SCALED[0], 90),
    "adjoint matching, scale 2": (ADJOINT_SCALED[1], 90),
    "adjoint matching, scale 3": (ADJOINT_SCALED[2], 90),
    "adjoint matching, scale 3, rate 4e-3": (ADJOINT_SCALED[2] | {"learning_rate": 4e-3}, 90),
    "adjoint matching, 110 steps": (ADJOINT_SCALED[0], 110),
    "adjoint matching, 110 steps, rate 4e-3": (ADJOINT_SCALED[0] | {"learning_rate": 4e-3}, 110),
    "adjoint matching, 110 steps, average of .9": (ADJOINT_SCALED[0] | {"ema_decay": 0.9}, 110),
    "adjoint matching, 110 steps, norm 1": (ADJOINT_SCALED[0] | {"max_grad_norm": 1.0}, 110),
    "adjoint matching, 100 steps, sum of two rewards": (ADJOINT_SCALED[0] | TWO_REWARDS, 100),
    "sum of two rewards": (TWO_REWARDS, 130),
    "sum of two rewards, rate 2e-3": (TWO_REWARDS | {"learning_rate": 2e-3}, 130),
    "rate 2e-3, average of .98": ({"learning_rate": 2e-3, "ema_decay": 0.98}, STEPS),
    "average of .98": ({"ema_decay": 0.98}, STEPS),
    "moved adapter": ({"method_kwargs": {"weight_perturbation": 0.05}}, 70),
    "16 videos": ({"per_device_train_batch_size": 16}, 80),
    "text layers": ({"lora_target_modules": TEXT}, STEPS),
    "text layers, rate 5e-3": ({"lora_target_modules": TEXT, "learning_rate": 5e-3}, STEPS),
    "text keys and values, rate 5e-3": ({"lora_target_modules": TEXT[1:3], "learning_rate": 5e-3}, STEPS),
    "video layers": ({"lora_target_modules": VIDEO}, STEPS),
    "queries, rate 5e-3": ({"lora_target_modules": VIDEO[:1], "learning_rate": 5e-3}, STEPS),
    "rank 8": ({"lora_rank": 8}, STEPS),
    "rank 4": ({"lora_rank": 4}, STEPS),
    "rank 4, norm .2": ({"lora_rank": 4, "max_grad_norm": 0.2}, STEPS),
    "rank 4, norm .1": ({"lora_rank": 4, "max_grad_norm": 0.1}, STEPS),
    "rank 4, rate 3e-3": ({"lora_rank": 4, "learning_rate": 3e-3}, STEPS),
    "rank 4, drift .05": ({"lora_rank": 4, "drift_weight": 0.05}, 110),
    "rank 2": ({"lora_rank": 2}, STEPS),
    "rank 2, norm .2": ({"lora_rank": 2, "max_grad_norm": 0.2}, STEPS),
    "text branch": ({"guidance_gradient": "text"}, STEPS),
    "first step": ({"method_kwargs": {"steps": [0]}}, 150),
    "second step": ({"method_kwargs": {"steps": [1]}}, 150),
    "second step, rank 4": ({"method_kwargs": {"steps": [1]}, "lora_rank": 4}, 150),
    "second step, norm .2": ({"method_kwargs": {"steps": [1]}, "max_grad_norm": 0.2}, 150),
    "second and third step": ({"method_kwargs": {"steps": [1, 2]}}, STEPS),
}


def main_job_table(result: dict) -> str:
    """Return a row for each arm: means over seeds with intervals, and the worst seed's loss."""
    lines = []
    for arm, rows in by_arm(result).items():
        cells = [cell(*mean_interval(gains(rows, m)), form_of(m)) for m in ("trained", "verifier", "clip", "diversity")]
        worst = min(gains(rows, "diversity"))
        lines.append([arm, str(len(rows)), str(rows[0]["steps"]), *cells, f"{worst:+.0f}"])
    headings = ["trained reward", "verifier, points", "CLIP score", "diversity, %", "worst seed's"]
    return table(["arm", "seeds", "steps", *headings], lines)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    given = arguments(__doc__.splitlines()[0], [*ARMS], STEPS).parse_args(argv)
    with opened(given, RESULT, FIRST_STEPS, EVAL_SEED) as study:
        study.calibrate([])
        tasks = []
        for seed in given.seeds or SEEDS:
            for arm in given.only:
                change, steps = ARMS[arm]
                settings, steps = changed(FIRST_STEPS, change), round(steps * given.steps / STEPS)
                about = {"arm": arm, "seed": seed, "settings": settings, "steps": steps}
                tasks.append((about, partial(study_runs.train, settings, seed, steps, study.conditions)))
        study.run(tasks)


if __name__ == "__main__":
    main()
