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
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from environment import environment

from rlhf.device import pick_device
from rlhf.tracking import read_metrics

ROOT = Path(__file__).parents[1]
RUNS, RESULT = ROOT / "bench" / "runs" / "methods", ROOT / "bench" / "results" / "methods.json"
MOST = 100  # seeds
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


def folder_of(arm: str, seed: int) -> Path:
    return RUNS / f"{arm.replace(', ', '-').replace(' = ', '').replace(' ', '_')}-{seed}"


def command(arm: str, seed: int, device: str, flags: list[str]) -> list[str]:
    folder = folder_of(arm, seed)
    settings = ARMS[arm] | {"seed": seed, "device": device, "output_dir": folder, "report_to": "none"}
    if any((folder / "checkpoints").glob("step-*[0-9]")):
        settings["resume_from_checkpoint"] = "latest"
    else:
        settings["overwrite_output_dir"] = True
    given = [word for key, value in settings.items() for word in (f"--{key}", *_words(value))]
    config = ["--config", str(ROOT / "configs" / "nano.yaml")]
    return [sys.executable, str(ROOT / "train_rlhf.py"), *config, *given, *flags]


def _words(value) -> list[str]:
    return [str(item) for item in (value if isinstance(value, list) else [value])]


def train(arm: str, seed: int, device: str, flags: list[str]) -> None:
    """Run until its summary is there; its output goes to log.txt beside it."""
    folder = folder_of(arm, seed)
    if (folder / "summary.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    with (folder / "log.txt").open("a") as log:
        done = subprocess.run(command(arm, seed, device, flags), stdout=log, stderr=subprocess.STDOUT, env=environ)
    print(f"{arm}, seed {seed}: {'done' if done.returncode == 0 else f'failed, see {folder}/log.txt'}", flush=True)


def row(arm: str, seed: int) -> dict:
    """What one finished run says: differences to the base (motion: relative), gains in spreads, seconds of a step."""
    folder = folder_of(arm, seed)
    summary = json.loads((folder / "summary.json").read_text())
    (trained,) = summary["trained"].values()
    found = {"arm": arm, "seed": seed, "settings": ARMS[arm], "steps": summary["steps"], "seconds": summary["seconds"]}
    found["seconds_per_step"] = statistics.median(row["seconds"] for row in read_metrics(folder))
    found |= {"trained": trained["diff"]} | {name: judge["diff"] for name, judge in summary["held_out"].items()}
    found["motion"] = summary["motion"]["tuned"] / summary["motion"]["base"] - 1
    found |= {measure: summary[measure]["diff"] for measure in ("diversity", "high_frequency", "saturation")}
    return found | {key: summary[key] for key in ("gain_trained", "gain_held_out", "hacking_gap")}


def write(device: torch.device, flags: list[str]) -> None:
    """The result of all runs that are done, by arm in the order of ARMS."""
    pairs = [(arm, seed) for arm in ARMS for seed in range(MOST) if (folder_of(arm, seed) / "summary.json").exists()]
    about = environment(device) | {"config": "configs/nano.yaml", "flags": flags}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"environment": about, "rows": [row(*pair) for pair in pairs]}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--device", help="kind of device; default: the accelerator of this machine")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of train_rlhf.py, last")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for seed in arguments.seeds:
            jobs = [pool.submit(train, arm, seed, device.type, arguments.flags) for arm in arguments.arms]
            for job in jobs:
                job.result()
                write(device, arguments.flags)


if __name__ == "__main__":
    main()
