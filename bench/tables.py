"""Put the tables of measured results into the guides: `python bench/tables.py`.

A guide marks the place: what stands between `<!-- table: bench/results/NAME.json -->` and `<!-- end of table -->` is
replaced by that file's table, or by nothing while there is no such file.
"""

import json
import re
from pathlib import Path

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
        if "skipped" in both:  # rewards of change between frames have nothing to say of one
            continue
        times = (f"{phase['seconds'] * 1e3:.1f}" for phase in (forward, both))
        row = (f"`{name}`", dtype if both["weights_gib"] else "-", str(frames), *times)
        lines.append(f"| {' | '.join(row)} | {both['peak_gib']:.2f} | {both['weights_gib']:.2f} |")
    return "\n".join(lines) + "\n"


TABLES = {"rewards.json": rewards_table}


def main() -> None:
    for guide in sorted((ROOT / "docs").glob("*.md")):
        text = guide.read_text()
        if fill(text) != text:
            guide.write_text(fill(text))
            print(f"wrote {guide.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
