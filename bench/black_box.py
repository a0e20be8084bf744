"""Train ContentV-nano by scores alone, by `nft` and `flow_grpo`, on rewards without a gradient.

    python bench/black_box.py [--only "JPEG size" ...] [--device cuda]

Writes bench/results/black_box.json; `python bench/tables.py` then fills docs/black_box.md. Rows
that are there are not made again.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.extend(map(str, Path(__file__).parents[:2]))  # also where this file is loaded as a reward
from environment import environment, make_parser, write_rows
from md_table import made_on, table

from rlhf.device import pick_device

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "black_box.json"
JUDGES = ["nano_preference", "nano_verifier", "nano_clip"]
BRIGHT, POLICY = "bright=bench/black_box.py:bright_pixels", {"method": "flow_grpo"}
ARMS = {  # the reward, which nothing differentiates, the judges, and other settings than `SETTINGS`
    "JPEG size": ("jpeg_size", JUDGES, {}),
    "bright pixels": (BRIGHT, JUDGES, {}),
    "preference": ("nano_preference", JUDGES[1:], {}),
    "JPEG size, `flow_grpo`": ("jpeg_size", JUDGES, POLICY),
    "bright pixels, `flow_grpo`": (BRIGHT, JUDGES, POLICY),
}
SETTINGS = {
    "method": "nft",
    "num_grad_steps": 1,
    "per_device_train_batch_size": 32,
    "learning_rate": 3e-3,
    "max_grad_norm": 0.3,
    "max_steps": 200,
    "eval_seed": 11,
    "num_diversity_prompts": 128,
    "per_device_eval_batch_size": 64,
    "report_to": "none",
    "sample_steps": 0,
    "num_sample_prompts": 0,
    "save_steps": 0,
}


def bright_pixels(video, prompts, **info):
    """Count the pixels of the first frame that are brighter than one half, in hundreds."""
    return (video[:, :, 0].mean(1) > 0.5).flatten(1).sum(1).float() / 100


bright_pixels.frames = "first"
bright_pixels.differentiable = False


def run_arm(arm: str, device: str) -> dict:
    """Train an arm in a process of its own; return its row."""
    reward, judges, changes = ARMS[arm]
    settings = SETTINGS | changes
    with tempfile.TemporaryDirectory() as folder:
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        flags += ["--reward_funcs", reward, "--eval_reward_funcs", *judges]
        flags += ["--device", device, "--output_dir", f"{folder}/run"]
        command = [sys.executable, "train_rlhf.py", "--config", "configs/nano.yaml", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{arm}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    return {"arm": arm, "reward": reward, "settings": settings, "summary": summary}


def black_box_table(result: dict) -> str:
    """Return a row for each reward: itself and the verifier on held-out prompts."""
    lines = []
    for row in result["rows"]:
        summary = row["summary"]
        ((_, trained),) = summary["trained"].items()
        verifier = summary["held_out"]["verifier"]
        low, high = trained["ci95"]
        change = f"{trained['base']:.3f} → {trained['tuned']:.3f}, {trained['diff']:+.3f} [{low:+.3f}, {high:+.3f}]"
        cells = [row["arm"], change, f"{verifier['base']:.0%} → {verifier['tuned']:.0%}"]
        lines.append([*cells, f"{summary['diversity']['tuned'] / summary['diversity']['base'] - 1:+.0%}"])
    headings = ["trained reward", "on held-out prompts, with its 95 % interval", "verifier", "diversity"]
    return made_on(result) + "\n\n" + table(headings, lines)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--device", help="kind of device; default: the accelerator of this machine")
    parser.add_argument("--output", type=Path, default=RESULT, help="the result's file")
    given = parser.parse_args(argv)
    device = pick_device(given.device)
    old = json.loads(given.output.read_text())["rows"] if given.output.exists() else []
    rows = {row["arm"]: row for row in old if row["settings"] == SETTINGS | ARMS[row["arm"]][2]}
    for arm in given.only:
        rows[arm] = rows.get(arm) or run_arm(arm, device.type)
        write_rows(given.output, environment(device), [rows[name] for name in ARMS if name in rows])
    print(black_box_table(json.loads(given.output.read_text())))


if __name__ == "__main__":
    main()
