"""The result of a run: summary.json, the table in the terminal, the contact sheet."""

from pathlib import Path

import torch

from rewards.cli.table import format_table
from rlhf.evaluation.statistics import INTERVAL, TOO_FEW, describe_change
from rlhf.io import write_json
from rlhf.report.contact_sheet import CONTACT_SHEET, draw_contact_sheet


def write_results(
    folder: Path, summary: dict, prompts: list[str], before_NCTHW: torch.Tensor, after_NCTHW: torch.Tensor
) -> None:
    """Write summary.json and, if there are uint8 videos, the contact sheet; print the table."""
    write_json(folder / "summary.json", summary)
    if len(before_NCTHW) and len(after_NCTHW):
        draw_contact_sheet(prompts, before_NCTHW, after_NCTHW, folder / CONTACT_SHEET)
    count, page = len(prompts), folder / "report.html"
    print(f"\n{count} held-out prompts, the same noise before and after\n\n{summary_table(summary)}\n")
    print(f"{summary['steps']} steps in {summary['seconds']:.0f} s. Before and after: {page}")


def remove_results(folder: Path) -> None:
    """Remove the results of an adapter that the run has replaced by one that is not evaluated."""
    for path in (folder / "summary.json", folder / CONTACT_SHEET, folder / "evaluation" / "tuned.safetensors"):
        path.unlink(missing_ok=True)


def summary_table(summary: dict) -> str:
    """Return the summary as text: a row for each reward, judge and measure.

    Below is a line for each measure that has too few videos to tell.
    """
    rows = [("", "base", "tuned", "difference", INTERVAL)]
    for group in ("trained", "held_out"):
        named = summary[group].items()
        rows += [_cells(f"{name} ({group.replace('_', '-')})", row) for name, row in named]
    measures = {name: summary[name] for name in ("motion", "diversity") if summary[name]}
    rows += [_cells(name, row) for name, row in measures.items()]
    meanings = {name: describe_change(name, row) for name, row in measures.items()}
    notes = [f"{name}: {meaning}" for name, meaning in meanings.items() if TOO_FEW in meaning]
    return "\n".join([format_table(rows, numbers=True), *notes])


def _cells(name: str, row: dict) -> tuple[str, ...]:
    """Return a row of the table, from one of `paired_interval`."""
    low, high = row["ci95"]
    means = f"{row['base']:.4f}", f"{row['tuned']:.4f}", f"{row['diff']:+.4f}"
    return name, *means, f"[{low:+.4f}, {high:+.4f}]" if low < high else "-"  # one prompt, or no spread
