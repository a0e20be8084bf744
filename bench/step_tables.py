"""The tables of bench/results/step.json: a step of the full-size model and its phases, by arm."""

import math
from collections.abc import Callable


def made_on(result: dict) -> str:
    """The device and the cores of its host; rows may say other cores than the environment."""
    about = result["environment"]
    cores = sorted({row.get("cores", about["cores"]) for row in result["rows"]})
    return f"Measured on {about['device']} ({' or '.join(map(str, cores))} cores), torch {about['torch']}."


STEP_PHASES = {  # of bench/step.py: column by phase
    "sampling": "sampling step, s",
    "segment": "one branch, forward and backward, s",
    "decode": "decoder without gradient, s",
    "decode and back": "decoder, forward and backward, s",
    "window": "last step, decoder and reward, forward and backward, s",
    "step": "whole step, s",
}
REFERENCES = ("peers' way", "stock autograd")
LESS_MEMORY = (  # options of the same step, from the one that they are added to; 8 bits can no longer be chosen
    "exact",
    "exact, activations on the host",
    "exact, weights streamed",
    "24 GiB",
    "8-bit base",
    "4-bit base",
    "8-bit optimizer",
)


def step_table(result: dict, exact: bool) -> str:
    """A table for each number of frames: the exact arms, or the others with what they give an hour."""
    elsewhere = [arm for arm in LESS_MEMORY if not _is_exact(arm)]
    rows = [row for row in result["rows"] if row["phase"] in STEP_PHASES and row["arm"] not in elsewhere]
    cells = _cells([row for row in rows if _is_exact(row["arm"]) == exact or row["arm"] in REFERENCES])
    return _by_frames(result, cells, lambda arms: _step_lines(arms, exact) if set(arms) - set(REFERENCES) else [])


def _cells(rows: list[dict]) -> dict[tuple, dict[str, dict[str, dict]]]:
    """Rows by frames and scored frames, arm and phase."""
    cells = {}
    for row in rows:
        cells.setdefault((row["frames"], row["scored"]), {}).setdefault(row["arm"], {})[row["phase"]] = row
    return cells


def _by_frames(result: dict, cells: dict, lines_of: Callable[[dict], list[str]]) -> str:
    """What is shown of each number of frames, if anything, under its heading."""
    lines, shown = [], []
    for (frames, scored), arms in cells.items():
        if found := lines_of(arms):
            lines += ["", f"{frames} frames, of them decoded and scored: {scored}", "", *found]
            shown += [row for phases in arms.values() for row in phases.values()]
    return "\n".join([made_on(result | {"rows": shown}), *lines]) + "\n"


def _is_exact(arm: str) -> bool:
    return arm in REFERENCES or arm.startswith(("exact", "24 GiB"))


def _step_lines(arms: dict[str, dict[str, dict]], exact: bool) -> list[str]:
    ours = [rows for arm, rows in arms.items() if exact or arm not in REFERENCES]
    phases = [phase for phase in STEP_PHASES if any(phase in rows for rows in ours)]
    last = ["GiB at most", "cosine to stock", "to the peers'"] if exact else ["gradients an hour"]
    columns = ["arm", *(STEP_PHASES[phase] for phase in phases), *last]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for arm, rows in arms.items():
        values = [f"`{arm}`", *(phase_cell(rows.get(phase)) for phase in phases)]
        values += _exact_cells(rows) if exact else [_gradients_an_hour(rows)]
        lines.append(f"| {' | '.join(values)} |")
    return lines


def phase_cell(row: dict | None) -> str:
    """Seconds, and what share of them the kernels' floor is."""
    if row is None or "seconds" not in row:
        return "-" if row is None else row["skipped"]
    share = f" ({100 * row['floor_seconds'] / row['seconds']:.0f} % floor)" if "floor_seconds" in row else ""
    return f"{row.get('seconds_per_gradient', row['seconds']):.2f}{share}"


def _exact_cells(rows: dict[str, dict]) -> list[str]:
    peaks = [row["peak_gib"] for row in rows.values() if "peak_gib" in row]
    against = [rows.get("window", {}).get(f"against {reference}") for reference in reversed(REFERENCES)]
    cosines = ["-" if one is None else f"{one['cosine']:.5f}, length {one['length']:.3f}" for one in against]
    return [f"{max(peaks):.1f}" if peaks else "-", *cosines]


def _gradients_an_hour(rows: dict[str, dict]) -> str:
    seconds = rows.get("step", {}).get("seconds_per_gradient")
    return f"{3600 / seconds:.0f}" if seconds else "-"


def less_memory_table(result: dict) -> str:
    """Seconds and GiB at most of each phase, for each number of frames that a rounded arm was measured on."""
    phases = {"sampling": "sampling step", "window": STEP_PHASES["window"].removesuffix(", s"), "update": "optimizer"}
    cells = _cells([row for row in result["rows"] if row["arm"] in LESS_MEMORY and row["phase"] in phases])

    def lines_of(arms: dict) -> list[str]:
        if all(map(_is_exact, arms)):
            return []
        rows = {arm: [_seconds_and_gib(arms[arm].get(phase)) for phase in phases] for arm in LESS_MEMORY if arm in arms}
        table = [f"| `{arm}` | {' | '.join(values)} |" for arm, values in rows.items()]
        return [f"| arm | {' | '.join(phases.values())} |", "|---" * 4 + "|", *table]

    return _by_frames(result, cells, lines_of)


def _seconds_and_gib(row: dict | None) -> str:
    if row is None or "seconds" not in row:
        return "-" if row is None else row["skipped"]
    seconds = row["seconds"]
    time = f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"
    return f"{time}, {row['peak_gib']:.1f} GiB"


def compile_table(result: dict) -> str:
    """After how many whole steps compiling has paid for itself, wherever both arms were measured."""
    cells, end = _cells([row for row in result["rows"] if "seconds" in row]), ", compiled"
    lines = ["| arm | frames | compiling, s | saved a step, s | pays after steps |", "|---|---|---|---|---|"]
    for (frames, scored), arm in ((where, arm) for where, arms in cells.items() for arm in arms):
        compiled = cells[frames, scored][arm]
        plain = cells[frames, scored].get(arm.removesuffix(end), {}) if arm.endswith(end) else {}
        if "step" not in compiled.keys() & plain.keys():
            continue
        cost, saved = _first(compiled) - _first(plain), plain["step"]["seconds"] - compiled["step"]["seconds"]
        pays = f"{math.ceil(cost / saved)}" if saved > 0 else "never"
        lines.append(f"| `{arm}` | {frames} | {cost:.0f} | {saved:.2f} | {pays} |")
    return "\n".join(lines) + "\n"


def _first(phases: dict[str, dict]) -> float:
    """Seconds that a step takes longer the first time; one branch alone compiles what the last step does."""
    found = [phases.get(phase, {}) for phase in ("sampling", "window", "step")]
    return sum(row["first_seconds"] - row["seconds"] for row in found if "first_seconds" in row)
