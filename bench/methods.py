"""Gains of every method on nano, on the trained reward and on held-out judges.

    python bench/methods.py [--seeds 0 1 2] [--only "draft_k, K = 1" drtune] [--device cuda]
        [--devices 0 1] [--jobs 6]

Each arm trains configs/nano.yaml with its settings for --steps optimizer steps, all the same
number; what a step costs is timed alone on a device. `python bench/tables.py` then fills
docs/methods.md. What follows --flags goes to every run.

Prediction: all four steps in the window gain most, since nano settles shape and motion in its first
steps; one late step (draft_k 1, refl, draft_lv) moves the trained reward less and the verifier
hardly; what holds the adapter to its base gains less and has the smaller hacking gap.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from nano_study import arguments, opened, run_of
from study_arms import ROOT

RESULT = ROOT / "bench" / "results" / "methods.json"
SEEDS = [0, 1, 2]
DEFAULT = "draft_k, K = 4"
ALL = {"num_grad_steps": 4}  # of nano's four
ONE = {"num_grad_steps": 1}
ARMS = {
    "draft_k, K = 1": ONE,
    "draft_k, K = 2": {"num_grad_steps": 2},
    "draft_k, K = 4": ALL,
    "draft_lv": ONE | {"method": "draft_lv"},
    "alignprop": ALL | {"method": "alignprop"},
    "uniform, K = 2": {"method": "uniform", "num_grad_steps": 2},
    "listed, 0 and 1": ONE | {"method": "listed", "method_kwargs": {"steps": [0, 1]}},
    "drtune, K = 2": {"method": "drtune", "num_grad_steps": 2},
    "drtune, K = 4": ALL | {"method": "drtune"},
    "refl": ONE | {"method": "refl", "method_kwargs": {"jump_steps": 2}},
    "srpo": ONE | {"method": "srpo"},
    "draft_k, K = 4, guidance text": ALL | {"guidance_gradient": "text"},
    "draft_k, K = 4, guidance none": ALL | {"guidance_gradient": "none"},
    "draft_k, K = 4, distilled": ALL | {"guidance_gradient": "distill", "drift_weight": 1.0},
    "draft_k, K = 4, drift 1": ALL | {"drift_weight": 1.0},
    "draft_k, K = 4, anchor 5": ALL | {"anchor_steps": 5},
    "draft_k, K = 4, average .9": ALL | {"ema_decay": 0.9},
    "leap_align": ONE | {"method": "leap_align"},
    "adjoint_matching": ONE | {"method": "adjoint_matching"},
    "draft_k, K = 1, four times the alpha": ONE | {"lora_alpha": 64},
    "draft_k, K = 1, four times the rate": ONE | {"learning_rate": 4e-3},
    "draft_k, K = 4, robust reward": ALL | {"method_kwargs": {"reward_perturbation": 0.02}},
    "draft_k, K = 4, robust weights": ALL | {"method_kwargs": {"weight_perturbation": 0.05}},
}


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    given = arguments(__doc__.splitlines()[0], list(ARMS), 80).parse_args(argv)
    with opened(given, RESULT, ARMS[DEFAULT]) as study:
        study.calibrate([ARMS[arm] for arm in given.only])
        pairs = [({"arm": arm, "seed": seed}, ARMS[arm]) for seed in given.seeds or SEEDS for arm in given.only]
        study.run([run_of(study, about, settings, given.steps) for about, settings in pairs])


if __name__ == "__main__":
    main()
