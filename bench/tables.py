"""Write the tables of measured results into pages: `python bench/tables.py`.

The pages are bench/results/*.md, the guides in docs/ and README.md. What stands between `<!--
table: bench/results/NAME.json -->` and `<!-- end of table -->` is replaced by that file's table, or
by nothing while there is no such file; NAME.json#PART is one of several tables. A single arm of
bench/study.py stands between `<!-- study: ARM -->` and `<!-- / -->`; `long` is of its long budget.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import judges
import study_report
from anchor_data import anchor_table
from black_box import black_box_table
from hacking import hacking_table
from main_job import main_job_table
from main_job_cpu import main_job_cpu_table
from md_table import GONE, label, made_on, table
from step_tables import compile_table, less_memory_table, phase_cell, step_table
from study_numbers import LONG_RESULT, MEASURES, RESULT, gains

OUT_OF_MEMORY = "out of memory"  # why a row of bench/reward_costs.py has no figures
ROOT = Path(__file__).parents[1]
STUDIES = {"study": RESULT.name, "long": LONG_RESULT.name}  # by the word that a single arm's place has
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
GAP = "hacking_gap"


def pages() -> list[Path]:
    """Return every page that may have tables."""
    folders = ROOT / "docs", ROOT / "bench" / "results", ROOT / "rlhf" / "nano" / "weights"
    return [ROOT / "README.md", *(page for folder in folders for page in sorted(folder.glob("*.md")))]


def fill(text: str, root: Path = ROOT) -> str:
    """Return the text of a page with every marked table made anew."""

    def made(place: re.Match) -> str:
        path, named = root / place[2].partition("#")[0], Path(place[2]).name
        text = TABLES[named](json.loads(path.read_text())) if path.exists() else ""
        return f"{place[1]}{text}{place[3]}"

    return PLACE.sub(made, text)


def rewards_table(result: dict) -> str:
    """Return a row for each reward, format and number of frames; times in milliseconds."""
    where, cells, lines = result["environment"], {}, []
    for row in result["rows"]:
        cells.setdefault((row["arm"], row["dtype"], row["frames"]), {})[row["phase"]] = row
    for (name, dtype, frames), phases in cells.items():
        forward, both = phases["forward"], phases["forward and backward"]
        if both.get("skipped", OUT_OF_MEMORY) != OUT_OF_MEMORY:  # it needs two frames
            continue
        times = [_cell(phase, "seconds", 1e3, ".1f") for phase in (forward, both)]
        weights = both["weights_gib"]
        gib = [_cell(both, "peak_gib", 1, ".2f"), f"{weights:.2f}"]
        lines.append([f"`{name}`", dtype if weights else "-", str(frames), *times, *gib])
    headings = ["reward", "model", "frames", "forward, ms", "forward and backward, ms"]
    headings += ["peak, GiB", "of it weights, GiB"]
    return (
        f"One video of {where['height']}x{where['width']} on one {where['device']}, torch {where['torch']}, median of "
        f"{where['repeats']}:\n\n{table(headings, lines)}"
    )


def _cell(row: dict, key: str, scale: float, form: str) -> str:
    return format(row[key] * scale, form) if key in row else row["skipped"]


def parity_table(result: dict) -> str:
    """Return a row for each reward and published pipeline, in units of 1/255."""
    lines = [
        [f"`{row['arm'].split(',')[0]}`{''.join(row['arm'].partition(',')[1:])}", row["pipeline"]]
        + ["under .01" if row[key] < 0.01 else f"{row[key]:.2f}" for key in ("mean", "max")]
        for row in result["rows"]
        if "spread" not in row
    ]
    about = result["environment"]
    libraries = ", ".join(f"{name} {about[name]}" for name in ("transformers", "torchvision", "open_clip", "PIL"))
    sizes = ", ".join(about["sizes"])
    headings = ["reward", "published pipeline", "mean difference", "largest"]
    return f"Units are 1/255, of noise and of soft shapes of {sizes}; {libraries}.\n\n{table(headings, lines)}"


def parity_scores_table(result: dict) -> str:
    """Return a row for each reward of videos whose scores were compared on random weights."""
    headings = ["reward", "pipeline of public packages", "spread of its scores", "mean difference", "largest"]
    lines = [
        [f"`{row['arm']}`", row["pipeline"], *(f"{row[key]:.2g}" for key in ("spread", "mean", "max"))]
        for row in result["rows"]
        if "spread" in row
    ]
    return f"transformers {result['environment']['transformers']}, peft {result['environment']['peft']}.\n\n" + table(
        headings, lines
    )


def guidance_table(result: dict) -> str:
    """Return a row for each adapter, number of steps and mode but the exact one."""
    headings = ["adapter", "steps with gradient", "`guidance_gradient`", "cosine with full", "length, full = 1"]
    lines = [
        [row["adapter"], str(row["grad_steps"]), row["arm"], f"{row['cosine']:.3f}", f"{row['norm_ratio']:.2f}"]
        for row in result["rows"]
        if row["arm"] != "full"
    ]
    return f"{made_on(result)}\n\n{table(headings, lines)}"


def methods_table(result: dict) -> str:
    """Return means over seeds with each arm's range; last, the seconds of a step."""
    last = "s a step", lambda row: f"{row['device_seconds'] / row['steps']:.3f}"
    measures = "trained", "verifier", "clip", GAP, "motion"
    return f"{made_on(result)}\n\n{_arms_table(result, measures, last)}"


def cheaper_table(result: dict) -> str:
    """Return means of arms with equal device time at full size; last, their steps."""
    last = "optimizer steps", lambda row: row["steps"]
    return f"{made_on(result)}\n\n{_arms_table(result, ('trained', 'verifier', 'clip', GAP, 'diversity'), last)}"


def caching_table(result: dict) -> str:
    """Return a row for each way to make a rollout cheaper, the most calls first."""
    rows = sorted(result["rows"], key=lambda row: -row["calls"])
    cells = [[f"`{r['arm']}`", f"{r['calls']:.1f}", f"{r['error']:.3f}", f"{r['score']:.3f}"] for r in rows]
    headings = ["rollout", "branch calls", "error", "trained reward"]
    return f"{made_on(result)} {rows[0]['videos']} videos.\n\n{table(headings, cells)}"


def _arms_table(result: dict, measures: tuple[str, ...], last: tuple[str, Callable[[dict], object]]) -> str:
    headings = ["run", "seeds", *("gap" if m == GAP else MEASURES[m][0] for m in measures), last[0]]
    lines = [
        [
            f"`{label(arm)}`",
            str(len(rows)),
            *(_over_seeds(rows, m) for m in measures),
            str(last[1](rows[0])),
        ]
        for arm, rows in _by_arm(result).items()
        if arm not in GONE
    ]
    return table(headings, lines)


def fill_cells(text: str, root: Path = ROOT) -> str:
    """Return the text with every single arm filled: mean gains of reward, verifier, diversity."""
    paths = {study: root / "bench" / "results" / name for study, name in STUDIES.items()}
    for study, path in paths.items():
        for arm, rows in _by_arm(json.loads(path.read_text())).items() if path.exists() else ():
            trained, verifier, diversity = (
                statistics.mean(gains(rows, measure)) for measure in ("trained", "verifier", "diversity")
            )
            cell = re.compile(f"(<!-- {study}: {re.escape(arm)} -->).*?(<!-- / -->)")
            text = cell.sub(rf"\g<1>{trained:+.3f}, {verifier:+.1f}, {diversity:+.0f} %\g<2>", text)
    return text


def _by_arm(result: dict) -> dict[str, list[dict]]:
    """Return the runs that ended well, in the order of the arms."""
    whole = [row for row in result["rows"] if "error" not in row]
    arms = {arm: [row for row in whole if row["arm"] == arm] for arm in result["environment"]["arms"]}
    return {arm: rows for arm, rows in arms.items() if rows}


def _over_seeds(rows: list[dict], measure: str) -> str:
    values = [row[GAP] for row in rows] if measure == GAP else gains(rows, measure)
    form = "+.3f" if measure == GAP or not MEASURES[measure][1] else "+.1f"
    found = statistics.mean(values), min(values), max(values)
    mean, low, high = (format(value, form) for value in found)
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


SCALE_PHASES = {  # of bench/scale.py: column by phase
    "sampling": "sampling step, s",
    "segment": "step with gradient, s",
    "decode": "decoder, forward and backward, s",
    "sum": "adapter's sum and update, s",
    "step": "whole step, s (worked out)",
}


def scale_table(result: dict) -> str:
    """Return a table for each number of frames, a row for each layout and number of devices."""
    cells, text = {}, f"{made_on(result)}\n"
    for row in result["rows"]:
        arms = cells.setdefault(row["frames"], {})
        arms.setdefault((row["devices"], row["arm"]), {})[row["phase"]] = row
    headings = ["devices", "layout", *SCALE_PHASES.values(), "efficiency: segment", "whole step", "peak, GiB"]
    for frames, arms in cells.items():
        lines = []
        for (devices, arm), rows in arms.items():
            values = [phase_cell(rows.get(phase)) for phase in SCALE_PHASES]
            shares = [_percent(rows.get(phase, {}).get("efficiency")) for phase in ("segment", "step")]
            peaks = [row["peak_gib"] for row in rows.values() if "peak_gib" in row]
            lines.append([str(devices), arm, *values, *shares, f"{max(peaks):.1f}" if peaks else "-"])
        scored = result["environment"]["scored"]
        text += f"\n{frames} frames, of them decoded: {scored}\n\n{table(headings, lines)}"
    return text


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def equality_table(result: dict) -> str:
    """Return how far each layout's small model is from one device's."""
    lines = []
    for row in result["rows"]:
        if row["phase"] == "equality":
            number = lambda key, row=row: f"{row[key]:.1e}" if key in row else row["skipped"]
            found = [number("gradient"), number("weights")]
            lines.append([str(row["devices"]), row["layout"], *found])
    headings = ["first gradient, of its largest number", "weights after 5 steps"]
    return table(["devices", "layout", *headings], lines)


TABLES = {
    "rewards.json": rewards_table,
    "reward_parity.json": parity_table,
    "reward_parity.json#scores": parity_scores_table,
    "guidance.json": guidance_table,
    "methods.json": methods_table,
    "alpha.json": methods_table,
    "cheaper.json": cheaper_table,
    "caching.json": caching_table,
    "step.json#exact": lambda result: step_table(result, exact=True),
    "step.json#cheaper": lambda result: step_table(result, exact=False),
    "step.json#compile": compile_table,
    "wan_1_3b.json": lambda result: step_table(result, exact=True),
    "wan_14b.json": lambda result: step_table(result, exact=True),
    "step.json#memory": less_memory_table,
    "scale.json#layouts": scale_table,
    "scale.json#equality": equality_table,
    **study_report.TABLES,
    "main_job.json": main_job_table,
    "main_job_cpu.json": main_job_cpu_table,
    "black_box.json": black_box_table,
    "hacking.json": hacking_table,
    "anchor_data.json": anchor_table,
    "judges.json": judges.judges_table,
}


def main() -> None:
    """Run the command."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (filled := fill_cells(fill(text))) != text:
            page.write_text(filled, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
