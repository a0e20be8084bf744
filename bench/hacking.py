"""A reward that is hacked, without and with each guard of the toolbox.

    python bench/hacking.py [--only "no guard" ...] [--device cpu] [--jobs 1]

Trains ContentV-nano on `docs/examples/broken.py:grain`, whose best video is a grid of dots. Writes
bench/results/hacking.json and docs/images/hacking_*.png; `python bench/tables.py` then fills
docs/hacking.md. Rows that are there are not made again.

Prediction: without a guard the reward gains tens of spreads while the verifier loses all it had.
Only what knows of another reward, or stops, keeps the pictures whole.
"""

import base64
import io
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, make_parser, write_rows
from md_table import made_on, table

from rewards.cli.files import read_video
from rlhf.device import pick_device
from rlhf.report.contact_sheet import new_figure

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "hacking.json"
IMAGES = ROOT / "docs" / "images"
HACKED = "grain=docs/examples/broken.py:grain"
NO_GUARD = "no guard"
EQUAL_GAIN = 4.0  # of the hacked reward, at which the arms' hacking gaps are compared
COMMON = {
    "method": "drtune",
    "num_grad_steps": 4,
    "learning_rate": 3e-3,
    "max_steps": 40,
    "eval_steps": 4,
    "num_eval_prompts": 32,
    "num_diversity_prompts": 32,
    "num_sample_prompts": 6,
    "per_device_train_batch_size": 4,
    "ema_decay": 0,
    "max_grad_norm": 0.3,
    "eval_reward_funcs": "nano_verifier",
    "report_to": "none",
}
WITH_PREFERENCE = {"reward_funcs": [HACKED, "nano_preference"], "calibrate_rewards": 32}
ARMS = {
    NO_GUARD: {},
    "early stopping, best adapter": {"early_stopping_patience": 2, "load_best_model_at_end": True},
    "a tenth of the learning rate": {"learning_rate": 3e-4},
    "average of the weights": {"ema_decay": 0.95},
    "drift control, weight 1": {"drift_weight": 1.0},
    "drift control, weight 10": {"drift_weight": 10.0},
    "every second step on the base": {"anchor_steps": 2},
    "a cap at twice the base's score": {"reward_caps": {"grain": 0.1}},
    "robust reward": {"method_kwargs": {"reward_perturbation": 0.02}},
    "robust weights": {"method_kwargs": {"weight_perturbation": 0.05}},
    "both robust": {"method_kwargs": {"reward_perturbation": 0.02, "weight_perturbation": 0.05}},
    "a second reward": WITH_PREFERENCE,
    "the lower of two rewards": WITH_PREFERENCE | {"reward_mix": "min"},
    "a second reward, gradients balanced": WITH_PREFERENCE | {"balance_reward_gradients": True},
}
SHOWN = 6  # videos of an arm in the picture


def settings_of(arm: str) -> dict:
    """Return an arm's settings: what it changes in configs/nano.yaml."""
    return {"reward_funcs": [HACKED]} | COMMON | ARMS[arm]


def flags_of(settings: dict) -> list[str]:
    """Return settings as flags of train_rlhf.py."""
    flags = []
    for name, value in settings.items():
        words = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *map(str, words)]
    return flags


def run_arm(arm: str, device: str) -> dict:
    """Train an arm in a process of its own; return its row."""
    return {"arm": arm, "settings": settings_of(arm)} | run(settings_of(arm), device)


def run(settings: dict, device: str) -> dict:
    """Train nano with these settings in a process of its own; return curve, summary and frames."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        flags = ["--output_dir", str(run), "--device", device, *flags_of(settings)]
        command = [sys.executable, "train_rlhf.py", "--config", "configs/nano.yaml", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{settings}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        summary = json.loads((run / "summary.json").read_text())
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        samples = sorted((run / "samples").iterdir())
        frames = [middle_frames(samples[0]), middle_frames(samples[-1])]
    curve = [{key: row[key] for key in row if key == "step" or key.startswith("eval/")} for row in rows]
    curve = [row for row in curve if len(row) > 1]
    return {"curve": curve, "summary": summary, "frames": frames}


def middle_frames(folder: Path) -> str:
    """Return the middle frames of the first videos in a folder of samples, side by side, as PNG."""
    videos = [read_video(path).pixels_BCTHW[0] for path in sorted(folder.glob("*.mp4"))[:SHOWN]]
    strip = torch.cat([video[:, video.shape[1] // 2] for video in videos], dim=-1)
    file = io.BytesIO()
    Image.fromarray((strip * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# ---------------------------------------------------------------------------------- what is shown


def turning_step(row: dict) -> int | None:
    """Return the first evaluated step from which on the verifier stays below the base, if any."""
    base = row["summary"]["held_out"]["verifier"]["base"]
    below = [point["eval/nano_verifier"] < base for point in row["curve"] if point["step"]]
    steps = [point["step"] for point in row["curve"] if point["step"]]
    worse = [step for step, at in zip(steps, range(len(steps)), strict=True) if all(below[at:])]
    return worse[0] if worse else None


def gap_at(row: dict, gain: float) -> float | None:
    """Return the hacking gap where the trained reward first reaches a gain, both in spreads.

    It is interpolated between evaluations, the base's included; None if the gain is never reached.
    """
    points = [(0.0, 0.0), *((point["eval/gain_trained"], point["eval/hacking_gap"]) for point in row["curve"])]
    for (gain_before, gap_before), (gain_after, gap_after) in pairwise(points):
        if gain_before < gain <= gain_after:
            share = (gain - gain_before) / (gain_after - gain_before)
            return gap_before + share * (gap_after - gap_before)
    return None


def hacking_table(result: dict) -> str:
    """Return a row for each arm: what the reward gains, and what becomes of the videos."""
    headings = ["guard", "steps", "hacked reward, spreads", f"hacking gap at +{EQUAL_GAIN:g} spreads"]
    headings += ["verifier, base → tuned", "below the base from step"]
    lines = []
    for row in result["rows"]:
        summary, turned = row["summary"], turning_step(row)
        verifier = summary["held_out"]["verifier"]
        gap = gap_at(row, EQUAL_GAIN)
        cells = [row["arm"], str(summary["steps"]), f"{summary['gain_trained']:+.1f}"]
        cells.append("-" if gap is None else f"{gap:.1f}")
        cells += [f"{verifier['base']:.0%} → {verifier['tuned']:.0%}", "never" if turned is None else str(turned)]
        cells += [f"{summary[m]['tuned'] / summary[m]['base'] - 1:+.0%}" for m in ("high_frequency", "diversity")]
        lines.append(cells)
    return made_on(result) + "\n\n" + table([*headings, "high frequencies", "diversity"], lines)


def draw_frames(rows: list[dict], path: Path) -> None:
    """Draw the base's videos, then those of each arm, a row each; same prompts and noise."""
    named = [("base", rows[0]["frames"][0]), *((row["arm"], row["frames"][1]) for row in rows)]
    figure, left = new_figure(2.6 + SHOWN, len(named) * 1.02), 2.6 / (2.6 + SHOWN)
    for at, (name, strip) in enumerate(named):
        bottom = 1 - (at + 1) / len(named)
        figure.text(0.01, bottom + 0.5 / len(named), name, va="center", fontsize=9)
        axis = figure.add_axes((left, bottom, 1 - left, 0.97 / len(named)))
        axis.imshow(Image.open(io.BytesIO(base64.b64decode(strip))), interpolation="nearest", aspect="auto")
        axis.axis("off")
    figure.savefig(path, dpi=110)


def draw_curves(rows: list[dict], path: Path) -> None:
    """Draw reward and verifier by step, without a guard and with each of the others."""
    figure = new_figure(9, 3.4)
    plots = [("hacked reward (log)", "eval/grain"), ("verifier, evaluation only", "eval/nano_verifier")]
    axes = [figure.add_axes((x, 0.15, 0.28, 0.72)) for x in (0.08, 0.42)]
    for axis, (title, key) in zip(axes, plots, strict=True):
        axis.set(title=title, xlabel="optimizer step")
        axis.spines[["top", "right"]].set_visible(False)
        for row in rows:
            style = {"color": "black", "linewidth": 2.2} if row["arm"] == NO_GUARD else {}
            points = [(point["step"], point[key]) for point in row["curve"] if key in point]
            axis.plot(*zip(*points, strict=True), label=row["arm"], **style)
    axes[0].set_yscale("log")
    axes[0].set_yticks([0.05, 0.1, 0.2, 0.5], ["0.05", "0.1", "0.2", "0.5"])
    axes[0].minorticks_off()
    axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=7.5, frameon=False)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--device", help="kind of device; default: the accelerator of this machine")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--output", type=Path, default=RESULT, help="the result's file")
    given = parser.parse_args(argv)
    device = pick_device(given.device)
    about = environment(device)
    old = json.loads(given.output.read_text()) if given.output.exists() else {"rows": []}
    rows = {row["arm"]: row for row in old["rows"] if row["arm"] in ARMS and row["settings"] == settings_of(row["arm"])}
    todo = [arm for arm in given.only or ARMS if arm not in rows]
    with ThreadPoolExecutor(given.jobs) as pool:
        for row in pool.map(lambda arm: run_arm(arm, device.type), todo):
            found = rows | {row["arm"]: row}
            rows = {arm: found[arm] for arm in ARMS if arm in found}
            write_rows(given.output, about, rows.values())
            print(hacking_table({"environment": about, "rows": [*rows.values()]}), flush=True)
    if given.output == RESULT:
        draw_frames([*rows.values()], IMAGES / "hacking_frames.png")
        draw_curves([*rows.values()], IMAGES / "hacking_curves.png")


if __name__ == "__main__":
    main()
