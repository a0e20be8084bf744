"""Put the tables of measured results into the guides: `python bench/tables.py`.

A guide marks the place: what stands between `<!-- table: bench/results/NAME.json -->` and `<!-- end of table -->` is
replaced by that file's table, or by nothing while there is no such file; NAME.json#PART is one of several. A single
result of bench/methods.py stands between `<!-- nano: ARM -->` and `<!-- / -->`.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before this folder, which has a rewards.py
from study_numbers import MEASURES, gains

OUT_OF_MEMORY = "out of memory"  # why a row of bench/rewards.py has no figures
ROOT = Path(__file__).parents[1]
METHODS = ROOT / "bench" / "results" / "methods.json"
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def fill(text: str, root: Path = ROOT) -> str:
    """The text of a guide with every marked table made anew."""

    def made(place: re.Match) -> str:
        path, named = root / place[2].partition("#")[0], Path(place[2]).name
        table = TABLES[named](json.loads(path.read_text())) if path.exists() else ""
        return f"{place[1]}{table}{place[3]}"

    return PLACE.sub(made, text)


def rewards_table(result: dict) -> str:
    """A row for each reward, format and number of frames; times in milliseconds."""
    where, cells = result["environment"], {}
    for row in result["rows"]:
        cells.setdefault((row["arm"], row["dtype"], row["frames"]), {})[row["phase"]] = row
    lines = [
        f"One video of {where['height']}x{where['width']} on one {where['device']}, torch {where['torch']}, median of "
        f"{where['repeats']}:\n",
        "| reward | model | frames | forward, ms | forward and backward, ms | peak, GiB | of it weights, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, dtype, frames), phases in cells.items():
        forward, both = phases["forward"], phases["forward and backward"]
        if both.get("skipped", OUT_OF_MEMORY) != OUT_OF_MEMORY:  # change between frames: nothing to say of one
            continue
        times = (_cell(phase, "seconds", 1e3, ".1f") for phase in (forward, both))
        memory = _cell(both, "peak_gib", 1, ".2f")
        row = (f"`{name}`", dtype if both["weights_gib"] else "-", str(frames), *times, memory)
        lines.append(f"| {' | '.join(row)} | {both['weights_gib']:.2f} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict, key: str, scale: float, form: str) -> str:
    return format(row[key] * scale, form) if key in row else row["skipped"]


def guidance_table(result: dict) -> str:
    """A row for each adapter, number of steps and mode but the exact one."""
    headings = "| adapter | steps with gradient | `guidance_gradient` | cosine with full | length, full = 1 |"
    lines = [f"{_made_on(result)}\n", headings, "|---" * 5 + "|"]
    for row in result["rows"]:
        if row["arm"] != "full":
            where = f"| {row['adapter']} | {row['grad_steps']} | {row['arm']} "
            lines.append(f"{where}| {row['cosine']:.3f} | {row['norm_ratio']:.2f} |")
    return "\n".join(lines) + "\n"


GAP = "hacking_gap"


def methods_table(result: dict) -> str:
    """A row for each arm; means over seeds, with the least and the most; last, what a step takes alone on a device."""
    return f"{_made_on(result)}\n\n{_study_lines(result, ('trained', 'verifier', 'clip', GAP, 'motion'), _cost)}"


def cheaper_table(result: dict) -> str:
    """As `methods_table`, for arms that had the same device time; last, the optimizer steps that this allowed."""
    about = f"{_made_on(result)} {result['environment']['budget_seconds']:.0f} device-seconds of training each."
    lines = _study_lines(result, ("trained", "verifier", "clip", GAP), ("optimizer steps", lambda row: row["steps"]))
    return f"{about}\n\n{lines}"


_cost = "s a step", lambda row: f"{row['device_seconds'] / row['steps']:.3f}"


def _study_lines(result: dict, measures: tuple[str, ...], last: tuple[str, Callable[[dict], object]]) -> str:
    headings = ["run", "seeds", *("gap" if m == GAP else MEASURES[m][0] for m in measures), last[0]]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for arm, rows in _by_arm(result).items():
        cells = [f"`{arm}`", str(len(rows)), *(_over_seeds(rows, m) for m in measures), str(last[1](rows[0]))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def fill_cells(text: str, result: dict) -> str:
    """The text with every single result replaced: gain of trained reward and verifier, means over seeds."""
    for arm, rows in _by_arm(result).items():
        trained, verifier = (statistics.mean(gains(rows, measure)) for measure in ("trained", "verifier"))
        cell = re.compile(f"(<!-- nano: {re.escape(arm)} -->).*?(<!-- / -->)")
        text = cell.sub(rf"\g<1>{trained:+.3f}, {verifier:+.1f}\g<2>", text)
    return text


def _by_arm(result: dict) -> dict[str, list[dict]]:
    """Of runs that ended well, in the order of the arms."""
    whole = [row for row in result["rows"] if "error" not in row]
    arms = {arm: [row for row in whole if row["arm"] == arm] for arm in result["environment"]["arms"]}
    return {arm: rows for arm, rows in arms.items() if rows}


def _over_seeds(rows: list[dict], measure: str) -> str:
    values = [row[GAP] for row in rows] if measure == GAP else gains(rows, measure)
    form = "+.3f" if measure == GAP or not MEASURES[measure][1] else "+.1f"
    mean, low, high = (format(value, form) for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def _made_on(result: dict) -> str:
    about = result["environment"]
    cores = sorted({about["cores"], *(row["cores"] for row in result["rows"] if "cores" in row)})  # of some rows alone
    return f"Measured on {about['device']} ({' or '.join(map(str, cores))} cores), torch {about['torch']}."


STEP_PHASES = {  # of bench/step.py: column by phase
    "sampling": "sampling step, s",
    "segment": "one branch there and back, s",
    "decode and back": "decoder there and back, s",
    "window": "last step, decoder, reward: there and back, s",
    "step": "whole step, s",
    "update": "optimizer, s",
}


def step_table(result: dict, exact: bool) -> str:
    """A table for each number of frames: the exact arms, or the others with what they give an hour."""
    lines, cells = [_made_on(result)], {}
    for row in result["rows"]:
        if _is_exact(row["arm"]) == exact or row["arm"] in REFERENCES:
            cells.setdefault((row["frames"], row["scored"]), {}).setdefault(row["arm"], {})[row["phase"]] = row
    for (frames, scored), arms in cells.items():
        if set(arms) - set(REFERENCES):
            lines += ["", f"{frames} frames, of them decoded and scored: {scored}", "", *_step_lines(arms, exact)]
    return "\n".join(lines) + "\n"


REFERENCES = ("peers' way", "stock autograd")


def _is_exact(arm: str) -> bool:
    return arm in REFERENCES or arm.startswith(("exact", "24 GiB"))


def _step_lines(arms: dict[str, dict[str, dict]], exact: bool) -> list[str]:
    phases = [phase for phase in STEP_PHASES if any(phase in rows for rows in arms.values())]
    last = ["GiB at most", "cosine to stock", "to the peers'"] if exact else ["gradients an hour"]
    columns = ["arm", *(STEP_PHASES[phase] for phase in phases), *last]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for arm, rows in arms.items():
        values = [f"`{arm}`", *(_phase_cell(rows.get(phase)) for phase in phases)]
        values += _exact_cells(rows) if exact else [_gradients_an_hour(rows)]
        lines.append(f"| {' | '.join(values)} |")
    return lines


def _phase_cell(row: dict | None) -> str:
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


def compile_table(result: dict) -> str:
    """After how many whole steps compiling has paid for itself, wherever both arms were measured."""
    rows, end = {}, ", compiled"
    for row in (row for row in result["rows"] if "seconds" in row):
        rows.setdefault((row["arm"], row["frames"], row["scored"]), {})[row["phase"]] = row
    lines = ["| arm | frames | compiling, s | saved a step, s | pays after steps |", "|---|---|---|---|---|"]
    for (arm, frames, scored), compiled in rows.items():
        plain = rows.get((arm.removesuffix(end), frames, scored), {}) if arm.endswith(end) else {}
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


def planner_table(result: dict) -> str:
    """A row for each setting: measured, predicted and how far off; then the worst of both."""
    lines = [_made_on(result), "", "| setting | GiB measured | predicted | | seconds a step measured | predicted | |"]
    lines += ["|---" * 7 + "|"]
    rows = [row for row in result["rows"] if "predicted" in row]
    for row in rows:
        cells = (f"{_planned(row, key, form)}" for key, form in (("peak_gib", ".2f"), ("seconds", ".2f")))
        lines.append(f"| {row['arm']} | {' | '.join(cells)} |")
    for key, name in (("peak_gib", "memory"), ("seconds", "time")):
        off = [100 * abs(row[f"{key}_ratio"] - 1) for row in rows if f"{key}_ratio" in row]
        told = f"{max(off):.0f} % off at most, {statistics.mean(off):.0f} % on average" if off else "not measured"
        lines += ["", f"Of {name}, {len(off)} settings: {told}."]
    return "\n".join(lines) + "\n"


def _planned(row: dict, key: str, form: str) -> str:
    both = [row[part][key] for part in ("measured", "predicted")]
    cells = ["-" if value is None else format(value, form) for value in both]
    ratio = row.get(f"{key}_ratio")
    return " | ".join([*cells, "-" if ratio is None else f"{100 * (ratio - 1):+.0f} %"])


SCALE_PHASES = {  # of bench/scale.py: column by phase
    "sampling": "sampling step, s",
    "segment": "step with gradient, s",
    "decode": "decoder there and back, s",
    "sum": "adapter's sum and update, s",
    "step": "whole step, s (worked out)",
}


def scale_table(result: dict) -> str:
    """A table for each number of frames, with a row for each layout and number of devices."""
    cells = {}
    for row in result["rows"]:
        cells.setdefault(row["frames"], {}).setdefault((row["devices"], row["arm"]), {})[row["phase"]] = row
    headings = ["devices", "layout", *SCALE_PHASES.values(), "efficiency: segment", "whole step", "GiB at most"]
    lines = [_made_on(result)]
    for frames, arms in cells.items():
        lines += ["", f"{frames} frames, of them decoded: {result['environment']['scored']}", ""]
        lines += [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
        for (devices, arm), rows in arms.items():
            values = [_phase_cell(rows.get(phase)) for phase in SCALE_PHASES]
            shares = [_percent(rows.get(phase, {}).get("efficiency")) for phase in ("segment", "step")]
            peaks = [row["peak_gib"] for row in rows.values() if "peak_gib" in row]
            values += [*shares, f"{max(peaks):.1f}" if peaks else "-"]
            lines.append(f"| {devices} | {arm} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def equality_table(result: dict) -> str:
    """How far each layout's small model is from one device's."""
    lines = ["| devices | layout | first gradient, of its largest number | weights after 5 steps |", "|---" * 4 + "|"]
    for row in result["rows"]:
        if row["phase"] == "equality":
            found = [f"{row[key]:.1e}" if key in row else row["skipped"] for key in ("gradient", "weights")]
            lines.append(f"| {row['devices']} | {row['layout']} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


TABLES = {
    "planner.json": planner_table,
    "planner_scale.json": planner_table,
    "rewards.json": rewards_table,
    "guidance.json": guidance_table,
    "methods.json": methods_table,
    "cheaper.json": cheaper_table,
    "step.json#exact": lambda result: step_table(result, exact=True),
    "step.json#cheaper": lambda result: step_table(result, exact=False),
    "step.json#compile": compile_table,
    "scale.json#layouts": scale_table,
    "scale.json#equality": equality_table,
}


def main() -> None:
    for guide in sorted((ROOT / "docs").glob("*.md")):
        text = guide.read_text()
        filled = fill_cells(fill(text), json.loads(METHODS.read_text()))
        if filled != text:
            guide.write_text(filled)
            print(f"wrote {guide.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
