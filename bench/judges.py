"""How nano's judges rate deformed clips: scores against strength, by kind and by shape.

    python bench/judges.py [--scenes 32] [--device cuda] [--output FILE]

Clips of held-out combinations are deformed (bench/nano/deform.py) by kinds that the judges were
trained on and by kinds that they never saw, as rendered and after the VAE. Writes
bench/results/judges.json and docs/images/judges.png; `python bench/judges.py --plot` only draws.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent / "nano"))
import deform
import torch
from environment import environment
from matplotlib.figure import Figure
from md_table import table
from pretrain_vae import reconstruct

from rewards import load_reward
from rlhf.device import pick_device
from rlhf.generator.loading import load_pipeline
from rlhf.io import write_json
from rlhf.nano import world

ROOT = Path(__file__).parents[1]
RESULT, PLOT = ROOT / "bench" / "results" / "judges.json", ROOT / "docs" / "images" / "judges.png"
STRENGTHS = [i / 8 for i in range(9)]
KINDS = (*deform.TRAINED, *deform.HELD_OUT)


@torch.no_grad()
def rate(kind: str, shape: int, count: int, judges: dict, vae=None) -> dict:
    """Return the row of a kind and a shape: mean scores by strength, and how well they rank.

    vae: also encodes and decodes the clips, if given.
    """
    generator = torch.Generator().manual_seed(17)
    scenes = world.sample_scenes(12 * count, generator, held_out=True)
    keep = (scenes["shape"] == shape).nonzero()[:count, 0]
    device = next(judges["preference"].parameters()).device
    scenes = {k: v[keep].to(device) for k, v in scenes.items()}
    chance, prompts = torch.rand(len(keep), deform.CHANCES, generator=generator).to(device), world.captions(scenes)
    scores = {name: [] for name in judges}
    for strength in STRENGTHS:
        each = deform.profiles(torch.full((len(keep),), strength, device=device), chance[:, -1]).clamp(max=1.4)
        video = deform.draw(kind, scenes, each, chance)
        video = reconstruct(vae, video) if vae else video
        for name, judge in judges.items():
            scores[name].append(judge(video, prompts).cpu())
    preference, right = (torch.stack(scores[name]) for name in ("preference", "verifier"))
    row = {"kind": kind, "held_out": kind in deform.HELD_OUT, "shape": world.SHAPES[shape], "through_vae": bool(vae)}
    return row | {
        "preference": [round(v, 4) for v in preference.mean(1).tolist()],
        "verifier": [round(v, 3) for v in right.mean(1).tolist()],
        "ranked": round((preference[:-2] > preference[2:]).float().mean().item(), 3),
        "whole_over_visible": round((preference[0] > preference[4]).float().mean().item(), 3),
    }


def turning_strength(verifier: list[float]) -> float | None:
    """Return the strength at which half of the clips that passed when whole no longer pass."""
    for i in range(1, len(verifier)):
        half = verifier[0] / 2
        if verifier[i] < half:
            before, after = verifier[i - 1], verifier[i]
            return round(STRENGTHS[i - 1] + (before - half) / (before - after) / 8, 3)
    return None


def mean_rows(rows: list[dict]) -> dict:
    """Return the means of rows over shapes."""
    mean = lambda key: [round(sum(v) / len(v), 4) for v in zip(*(r[key] for r in rows), strict=True)]
    curves = {key: mean(key) for key in ("preference", "verifier")}
    shares = {key: round(sum(r[key] for r in rows) / len(rows), 3) for key in ("ranked", "whole_over_visible")}
    return curves | shares | {"turns_at": turning_strength(curves["verifier"])}


def summarize(rows: list[dict]) -> list[dict]:
    """Return a row for each kind and for all kinds of a sort, the means over shapes."""
    found = []
    for through in (False, True):
        some = [r for r in rows if r["through_vae"] == through]
        for kind in KINDS:
            about = {"kind": kind, "held_out": kind in deform.HELD_OUT, "through_vae": through}
            found.append(about | mean_rows([r for r in some if r["kind"] == kind]))
    return found


def judges_table(result: dict) -> str:
    """Return a row for each kind: how often the judges agree with the strength."""
    lines = []
    for kind in KINDS:
        plain, through = (
            next(r for r in result["kinds"] if (r["kind"], r["through_vae"]) == (kind, way)) for way in (False, True)
        )
        turns = [f"{r['turns_at']:.2f}" if r["turns_at"] is not None else "above 1" for r in (plain, through)]
        drop = plain["preference"][0] - plain["preference"][4]
        ranked = [f"{r['ranked']:.0%}" for r in (plain, through)]
        lines.append([kind + (" *" if kind in deform.HELD_OUT else ""), *ranked, f"{drop:.3f}", *turns])
    headings = ["ranked right", "after the VAE", "preference lost at .5", "verifier turns at", "after the VAE"]
    return table(["kind", *headings], lines)


def plot(result: dict, path: Path) -> None:
    """Draw both judges' curves, a column for each kind and a thin line for each shape."""
    figure = Figure(figsize=(1.35 * len(KINDS), 4.2))
    axes = figure.subplots(2, len(KINDS), sharex=True, sharey="row")
    colors = ["#d62728", "#1f6feb", "#2ca02c", "#b8a800", "#e8710a", "#17a2b8"]
    for column, kind in enumerate(KINDS):
        for row, key in enumerate(("preference", "verifier")):
            axis = axes[row][column]
            for shape, color in zip(world.SHAPES, colors, strict=True):
                (one,) = [
                    r for r in result["rows"] if (r["kind"], r["shape"], r["through_vae"]) == (kind, shape, False)
                ]
                axis.plot(STRENGTHS, one[key], color=color, linewidth=1, label=shape)
            (mean,) = [r for r in result["kinds"] if r["kind"] == kind and not r["through_vae"]]
            axis.plot(STRENGTHS, mean[key], color="black", linewidth=2)
            axis.axvline(deform.VISIBLE, color="gray", linewidth=0.7, linestyle=":")
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=7)
        is_new = kind in deform.HELD_OUT
        axes[0][column].set_title(kind + ("*" if is_new else ""), fontsize=9, color="#e8710a" if is_new else "black")
    axes[0][0].set_ylabel("preference", fontsize=9)
    axes[1][0].set_ylabel("verifier: right", fontsize=9)
    axes[1][0].legend(fontsize=6, frameon=False)
    figure.supxlabel("strength of the deformation (*: a kind the judges were not trained on)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=32, help="clips of each shape and kind (default: %(default)s)")
    parser.add_argument("--device", help="kind of device (default: what the machine has)")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--plot", action="store_true", help="draw the stored result")
    given = parser.parse_args(argv)
    if not given.plot:
        device = pick_device(given.device)
        judges = {name: load_reward(f"nano_{name}").to(device) for name in ("preference", "verifier")}
        vae = load_pipeline("nano", device=device).vae.float()
        rows = [
            rate(kind, shape, given.scenes, judges, through)
            for through in (None, vae)
            for kind in KINDS
            for shape in range(len(world.SHAPES))
        ]
        about = environment(device) | {"scenes": given.scenes, "strengths": STRENGTHS, "visible": deform.VISIBLE}
        write_json(given.output, {"environment": about, "kinds": summarize(rows), "rows": rows}, indent=1)
    plot(json.loads(given.output.read_text()), PLOT)


if __name__ == "__main__":
    main()
