"""Put the tables of measured results into the guides: `python bench/tables.py`.

A guide marks the place: what stands between `<!-- table: bench/results/NAME.json -->` and `<!-- end of table -->` is
replaced by that file's table, or by nothing while there is no such file.
"""

import json
import re
from pathlib import Path

OUT_OF_MEMORY = "out of memory"  # why a row of bench/rewards.py has no figures
ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def fill(text: str, root: Path = ROOT) -> str:
    """The text of a guide with every marked table made anew."""

    def made(place: re.Match) -> str:
        path = root / place[2]
        table = TABLES[path.name](json.loads(path.read_text())) if path.exists() else ""
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


TABLES = {"rewards.json": rewards_table}


def main() -> None:
    for guide in sorted((ROOT / "docs").glob("*.md")):
        text = guide.read_text()
        if fill(text) != text:
            guide.write_text(fill(text))
            print(f"wrote {guide.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
