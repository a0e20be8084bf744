"""Write what was measured into the heads of the recipes: `python bench/recipes.py`.

The line `# Measured: ...` of each recipe that an arm of bench/step.py is like gets that arm's time and memory from
bench/results/step.json; the others, and those not measured, say that they are not measured.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARMS = {  # recipe: arm, frames, frames that are scored, denoising steps
    "contentv_8b_mps": ("exact", 125, 1, 25),
    "contentv_8b_all_frames": ("exact", 125, 125, 25),
    "contentv_8b_24gib": ("24 GiB", 33, 33, 25),
}
LINE = re.compile(r"^# Measured: .*$", re.MULTILINE)


def measured(name: str, result: dict) -> str:
    """What the head of a recipe says, of whole steps by an arm with its settings and random weights."""
    arm, *sizes = ARMS.get(name, (None,))
    rows = [row for row in result.get("rows", []) if row["arm"] == arm and row["phase"] == "step" and "seconds" in row]
    found = [row for row in rows if [row["frames"], row["scored"], row["steps"]] == sizes]
    if not found:
        return "not measured."
    row, device = found[-1], result["environment"]["device"]
    told = f"{row['seconds']:.0f} s a video and {row['peak_gib']:.1f} GiB on one {device}, random weights, HPS v2.1"
    return f"{told}."


def main(folder: Path = ROOT / "configs", result: Path = ROOT / "bench" / "results" / "step.json") -> None:
    found = json.loads(result.read_text()) if result.exists() else {}
    for path in sorted(folder.glob("contentv_8b_*.yaml")):
        text = path.read_text()
        filled = LINE.sub(f"# Measured: {measured(path.stem, found)}", text)
        if filled != text:
            path.write_text(filled)
            print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
