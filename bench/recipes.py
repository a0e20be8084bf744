"""Write measured costs into recipes and docs/contentv_8b.md: `python bench/recipes.py`.

The line `# Measured: ...` of each recipe that an arm of bench/step.py is like gets that arm's time
and memory from bench/results/step.json, for Wan from the files beside it. Host memory and start-up
of a whole run follow if bench/host_memory.py measured them. The others, and those not measured, say
that they are not measured.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT, GUIDE = ROOT / "bench" / "results" / "step.json", ROOT / "docs" / "contentv_8b.md"
ARMS = {  # recipe: arm, frames, frames that are scored, denoising steps
    "contentv_8b_fast": ("a quarter of the steps, rollouts used 4 times, FlashAttention-3", 33, 1, 25),
    "contentv_8b_mps": ("exact, compiled", 125, 1, 25),
    "contentv_8b_all_frames": ("exact, compiled", 125, 125, 25),
    "contentv_8b_24gib": ("24 GiB", 33, 33, 25),
    "wan21_t2v_1_3b": ("exact", 81, 81, 25),
    "wan21_t2v_14b": ("exact", 81, 81, 25),
}
OTHER_RESULTS = {"wan21_t2v_1_3b": "wan_1_3b.json", "wan21_t2v_14b": "wan_14b.json"}  # else step.json
COSTS = {  # what a row says: arm, frames, frames that are scored, denoising steps
    "33 frames, the first scored, no recomputation, compiled": ("exact, nothing twice, compiled", 33, 1, 25),
    "33 frames, all scored, on 24 GiB (`contentv_8b_24gib.yaml`)": ("24 GiB", 33, 33, 25),
    "33 frames, the first scored, VideoX-Fun's step": ("peers' way", 33, 1, 25),
    "125 frames, all scored (`contentv_8b_all_frames.yaml`)": ("exact, compiled", 125, 125, 25),
    "125 frames, the first scored, VideoX-Fun's step": ("peers' way", 125, 1, 25),
}
PLACE = re.compile(r"(<!-- costs -->\n).*?(<!-- end of costs -->)", re.DOTALL)
LINE = re.compile(r"^# Measured: .*$", re.MULTILINE)


def measured(name: str, result: dict) -> str:
    """Return what a recipe's head says of whole steps of its arm, with random weights."""
    found = cost(result, *ARMS[name]) if name in ARMS else None
    if found is None:
        return "not measured."
    seconds, gib, how = found
    device = result["environment"]["device"]
    time = f"{seconds:.1f}" if seconds < 10 else f"{seconds:.0f}"
    return f"{time} s a video{how} and {gib:.1f} GiB on one {device}, random weights, HPS v2.1."


def host_told(name: str, result: dict) -> str:
    """Return what a recipe's head says of whole runs' host memory and start-up; "" for no runs."""
    rows = [row for row in result.get("rows", []) if row["recipe"] == name]
    if not rows or result["environment"]["size"] != "full":
        return ""
    host, start = max(row["peak_total_gib"] for row in rows), min(row["first_step_after_seconds"] for row in rows)
    return f" A whole run: {host:.0f} GiB of host memory, first step after {start:.0f} s."


def cost(result: dict, arm: str, frames: int, scored: int, steps: int) -> tuple[float, float, str] | None:
    """Return a video's seconds, peak GiB, and how they are known; None if they are not.

    Measured whole, or worked out of its measured parts: steps without gradient, then the last one
    with decoder, reward and the way back.
    """
    of_arm = [r for r in result.get("rows", []) if (r["arm"], r["frames"], r["scored"]) == (arm, frames, scored)]
    rows = {row["phase"]: row for row in of_arm if "seconds" in row and row.get("steps", steps) == steps}
    gib = max((row["peak_gib"] for row in rows.values()), default=0.0)
    if "step" in rows:
        return rows["step"].get("seconds_per_gradient", rows["step"]["seconds"]), gib, ""
    if {"sampling", "window"} <= rows.keys():
        return (steps - 1) * rows["sampling"]["seconds"] + rows["window"]["seconds"], gib, " (from its parts)"
    return None


def read(result: Path) -> dict:
    """Return a result file's content; {} without the file."""
    return json.loads(result.read_text()) if result.exists() else {}


def costs_table(result: dict) -> str:
    """Return the table of what trainings of COSTS take on one device."""
    device = result.get("environment", {}).get("device")
    lines = [f"One {device}, 8 videos an optimizer step:\n", "| | a video, s | GiB | 500 steps, h |"]
    lines.append("|---" * 4 + "|")
    for told, sizes in COSTS.items():
        if found := cost(result, *sizes):
            seconds, gib, how = found
            lines.append(f"| {told} | {seconds:.0f}{how} | {gib:.0f} | {seconds * 8 * 500 / 3600:.0f} |")
    return "\n".join(lines) + "\n" if len(lines) > 3 else "Not measured yet.\n"


def layouts_told(result: dict) -> str:
    """Return a paragraph about a step on two devices; "" where it was not measured."""
    rows = {row["arm"]: row for row in result.get("rows", []) if row["phase"] == "step" and "seconds" in row}
    if not {"one device", "data", "guidance", "sequence"} <= rows.keys():
        return ""
    one, data, guidance, sequence = (rows[arm] for arm in ("one device", "data", "guidance", "sequence"))
    return (
        f"\nTwo devices ({one['frames']} frames, the first scored; `bench/results/scale.json`): a video takes "
        f"{one['seconds']:.0f} s on one.\nIt takes {data['seconds']:.0f} s if each has another video. One video on "
        f"both takes {guidance['seconds']:.0f} s with a guidance branch on each, or\n"
        f"{sequence['seconds']:.0f} s with half of the tokens on each.\n"
    )


def main(folder: Path = ROOT / "configs", result: Path = RESULT, guide: Path = GUIDE) -> None:
    """Run the command."""
    found, scale = read(result), read(result.with_name("scale.json"))
    table = costs_table(found) + layouts_told(scale)
    guide.write_text(PLACE.sub(lambda place: f"{place[1]}{table}{place[2]}", guide.read_text()))
    for path in sorted([*folder.glob("contentv_8b_*.yaml"), *folder.glob("wan21_*.yaml")]):
        text, other = path.read_text(), OTHER_RESULTS.get(path.stem)
        costs = read(result.with_name(other)) if other else found
        told = measured(path.stem, costs) + host_told(path.stem, read(result.with_name("host_memory.json")))
        filled = LINE.sub(f"# Measured: {told}", text)
        if filled != text:
            path.write_text(filled)
            print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
