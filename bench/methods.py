"""Every method on nano, over seeds: what each gains on the trained reward and on judges that it never saw.

    python bench/methods.py [--seeds 0 1 2] [--arms draft_k drtune] [--jobs 4] [--device cuda] [--flags ...]

Each run is `train_rlhf.py --config configs/nano.yaml` with the arm's settings, evaluation included, in a process of its
own; `--jobs` of them at a time. A run that is done is not made again, and one that was stopped goes on: its folder is
bench/runs/methods/ARM-SEED. After each run bench/results/methods.json is written anew from all that are done;
`python bench/tables.py` then fills docs/methods.md. What follows --flags goes to every run, such as --max_steps 20.

Prediction: all four steps in the window gain most, since nano settles shape and motion in its first steps; one late
step (draft_k 1, refl, draft_lv) moves the trained reward less and the verifier hardly; what holds the adapter to its
base gains less and has the smaller hacking gap.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before this folder, which has a rewards.py
from nano_runs import Study

from rlhf.device import pick_device

ALL = {"num_grad_steps": 4}  # of nano's four
ONE = {"num_grad_steps": 1}
ARMS = {
    "draft_k, K = 1": ONE,
    "draft_k, K = 2": {"num_grad_steps": 2},
    "draft_k, K = 4": ALL,
    "draft_lv": ONE | {"method": "draft_lv"},
    "alignprop": ALL | {"method": "alignprop"},
    "uniform, K = 2": {"method": "uniform", "num_grad_steps": 2},
    "listed, 0 and 1": ONE | {"method": "listed", "grad_steps": [0, 1]},
    "drtune, K = 2": {"method": "drtune", "num_grad_steps": 2},
    "drtune, K = 4": ALL | {"method": "drtune"},
    "refl": ONE | {"method": "refl", "jump_steps": 2},
    "srpo": ONE | {"method": "srpo"},
    "draft_k, K = 4, guidance text": ALL | {"guidance_gradient": "text"},
    "draft_k, K = 4, guidance none": ALL | {"guidance_gradient": "none"},
    "draft_k, K = 4, distilled": ALL | {"guidance_gradient": "distill", "drift_weight": 1.0, "drift_weighting": "even"},
    "draft_k, K = 4, drift 1": ALL | {"drift_weight": 1.0},
    "draft_k, K = 4, anchor 5": ALL | {"anchor_steps": 5},
    "draft_k, K = 4, average .9": ALL | {"ema_decay": 0.9},
    "draft_k, K = 4, DoRA": ALL | {"lora_use_dora": True},
    "draft_k, K = 4, block 2 whole": ALL | {"train_blocks": ["transformer_blocks.2"], "learning_rate": 1e-4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--device", help="kind of device; default: the accelerator of this machine")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of train_rlhf.py, last")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    flags = arguments.flags
    Study("methods", ARMS).train_all(
        arguments.arms, arguments.seeds, arguments.jobs, device, lambda _: flags, {"flags": flags}
    )


if __name__ == "__main__":
    main()
