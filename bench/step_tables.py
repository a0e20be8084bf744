"""The tables of bench/results/step.json: a step of the full-size model and its phases, by arm."""

import math
from collections.abc import Callable

from md_table import GONE, label, made_on, table

STEP_PHASES = {  # of bench/step.py: column by phase
    "sampling": "sampling step, s",
    "segment": "one branch, forward and backward, s",
    "decode": "decoder without gradient, s",
    "decode and back": "decoder, forward and backward, s",
    "window": "last step, decoder and reward, forward and backward, s",
    "step": "whole step, s",
}
MEMORY_PHASES = {"sampling": "sampling step", "window": "last step, decoder and reward", "update": "optimizer"}
REFERENCES = ("peers' way", "stock autograd")
LESS_MEMORY = (  # options of one step, from the one that they are added to
    "exact",
    "exact, activations on the host",
    "exact, weights streamed",
    "24 GiB",
    "4-bit base",
)


def step_table(result: dict, exact: bool) -> str:
    """Return a table for each number of frames, of the exact arms or of the others."""
    shown = [arm for arm in {row["arm"] for row in result["rows"]} if _is_exact(arm) == exact or arm in REFERENCES]
    shown = {*shown} - GONE - {arm for arm in LESS_MEMORY if not _is_exact(arm)}
    cells = _cells([row for row in result["rows"] if row["phase"] in STEP_PHASES and row["arm"] in shown])
    return _by_frames(result, cells, lambda arms: _step_table(arms, exact) if set(arms) - set(REFERENCES) else "")


def _cells(rows: list[dict]) -> dict[tuple, dict[str, dict[str, dict]]]:
    """Return the rows by frames and scored frames, then arm, then phase."""
    cells = {}
    for row in rows:
        cells.setdefault((row["frames"], row["scored"]), {}).setdefault(row["arm"], {})[row["phase"]] = row
    return cells


def _by_frames(result: dict, cells: dict, table_of: Callable[[dict], str]) -> str:
    """Return the table of each number of frames, where there is one, under its heading."""
    text, shown = "", []
    for (frames, scored), arms in cells.items():
        if made := table_of(arms):
            text += f"\n{frames} frames, of them decoded and scored: {scored}\n\n{made}"
            shown += [row for phases in arms.values() for row in phases.values()]
    return f"{made_on(result | {'rows': shown})}\n{text}"


def _is_exact(arm: str) -> bool:
    return arm in REFERENCES or arm.startswith(("exact", "24 GiB"))


def _step_table(arms: dict[str, dict[str, dict]], exact: bool) -> str:
    ours = [rows for arm, rows in arms.items() if exact or arm not in REFERENCES]
    phases = [phase for phase in STEP_PHASES if any(phase in rows for rows in ours)]
    last = ["peak, GiB", "cosine to stock", "to VideoX-Fun's"] if exact else ["gradients an hour"]
    lines = []
    for arm, rows in arms.items():
        values = [phase_cell(rows.get(phase)) for phase in phases]
        lines.append([f"`{label(arm)}`", *values, *(_exact_cells(rows) if exact else [_gradients_an_hour(rows)])])
    return table(["arm", *(STEP_PHASES[phase] for phase in phases), *last], lines)


def phase_cell(row: dict | None) -> str:
    """Return the seconds of a phase, and the share of them that is the kernels' floor."""
    if row is None or "seconds" not in row:
        return _reason(row)
    share = f" ({100 * row['floor_seconds'] / row['seconds']:.0f} % floor)" if "floor_seconds" in row else ""
    return f"{row.get('seconds_per_gradient', row['seconds']):.2f}{share}"


def _reason(row: dict | None) -> str:
    """Return why a phase has no figures. -: it was not measured."""
    if row is None:
        return "-"
    limit = f" at {row['limit_gib']:.0f} GiB" if row.get("limit_gib") else ""
    return f"{row['skipped']}{limit}"


def _peak(rows: dict[str, dict]) -> str:
    """Return the largest peak in GiB, or the limit that a phase did not fit into."""
    if limits := [row["limit_gib"] for row in rows.values() if row.get("limit_gib")]:
        return f"over {max(limits):.0f}"
    peaks = [row["peak_gib"] for row in rows.values() if "peak_gib" in row]
    return f"{max(peaks):.1f}" if peaks else "-"


def _exact_cells(rows: dict[str, dict]) -> list[str]:
    against = [rows.get("window", {}).get(f"against {reference}") for reference in reversed(REFERENCES)]
    cosines = ["-" if one is None else f"{one['cosine']:.5f}, length {one['length']:.3f}" for one in against]
    return [_peak(rows), *cosines]


def _gradients_an_hour(rows: dict[str, dict]) -> str:
    seconds = rows.get("step", {}).get("seconds_per_gradient")
    return f"{3600 / seconds:.0f}" if seconds else "-"


def less_memory_table(result: dict) -> str:
    """Return seconds and peak memory of each phase, at the frames of a rounded arm."""
    cells = _cells([row for row in result["rows"] if row["arm"] in LESS_MEMORY and row["phase"] in MEMORY_PHASES])

    def table_of(arms: dict) -> str:
        found = [arm for arm in LESS_MEMORY if arm in arms]
        rows = [[f"`{arm}`", *(_seconds_and_gib(arms[arm].get(phase)) for phase in MEMORY_PHASES)] for arm in found]
        return "" if all(map(_is_exact, arms)) else table(["arm", *MEMORY_PHASES.values()], rows)

    return _by_frames(result, cells, table_of)


def _seconds_and_gib(row: dict | None) -> str:
    if row is None or "seconds" not in row:
        return _reason(row)
    seconds = row["seconds"]
    time = f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"
    return f"{time}, {row['peak_gib']:.1f} GiB"


def compile_table(result: dict) -> str:
    """Return the number of whole steps after which compiling has paid for itself."""
    cells, end, lines = _cells([row for row in result["rows"] if "seconds" in row]), ", compiled", []
    for (frames, scored), arm in ((where, arm) for where, arms in cells.items() for arm in arms):
        compiled = cells[frames, scored][arm]
        plain = cells[frames, scored].get(arm.removesuffix(end), {}) if arm.endswith(end) else {}
        if "step" in compiled.keys() & plain.keys():
            cost = _first(compiled) - _first(plain)
            saved = plain["step"]["seconds"] - compiled["step"]["seconds"]
            pays = f"{math.ceil(cost / saved)}" if saved > 0 else "never"
            lines.append([f"`{label(arm)}`", str(frames), f"{cost:.0f}", f"{saved:.2f}", pays])
    return table(["arm", "frames", "compiling, s", "saved a step, s", "pays after steps"], lines)


def _first(phases: dict[str, dict]) -> float:
    """Return by how many seconds a step is longer the first time."""
    found = [phases.get(phase, {}) for phase in ("sampling", "window", "step")]
    return sum(row["first_seconds"] - row["seconds"] for row in found if "first_seconds" in row)
