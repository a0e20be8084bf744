"""Fill the tables of docs/methods.md from bench/results: `python bench/tables.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, a single result between `<!-- nano: ARM -->` and
`<!-- / -->`; what is there is replaced.
"""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS, DOC = ROOT / "bench" / "results", ROOT / "docs" / "methods.md"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(text: str, name: str, table: str) -> str:
    """The text with the table of that name replaced. ValueError if it has no such place."""
    begin, end = f"<!-- table: {name} -->", "<!-- end -->"
    pattern = re.compile(f"({re.escape(begin)}\n).*?({re.escape(end)})", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"got no place for the table {name!r}, expected {begin} and {end}; add them")
    return pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def fill_cells(text: str, result: dict) -> str:
    """The text with every single result replaced: trained reward and verifier, means over seeds."""
    for arm in dict.fromkeys(row["arm"] for row in result["rows"]):
        of_arm = [row for row in result["rows"] if row["arm"] == arm]
        trained, verifier = (statistics.mean(row[key] for row in of_arm) for key in ("trained", "verifier"))
        pattern = re.compile(f"(<!-- nano: {re.escape(arm)} -->).*?(<!-- / -->)")
        text = pattern.sub(rf"\g<1>{trained:+.3f}, {100 * verifier:+.1f}\g<2>", text)
    return text


def over_seeds(rows: list[dict], key: str, percent: bool = False) -> str:
    """Mean and, of several seeds, the least and the most."""
    values = [row[key] * (100 if percent else 1) for row in rows]
    form = "{:+.1f}" if percent else "{:+.3f}"
    mean, low, high = (form.format(v) for v in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def methods(result: dict) -> str:
    head = ["run", "seeds", "trained reward", "verifier, points", "CLIP score", "gap", "motion, %", "s a step"]
    rows = []
    for arm in dict.fromkeys(row["arm"] for row in result["rows"]):
        of_arm = [row for row in result["rows"] if row["arm"] == arm]
        seconds = statistics.mean(row["seconds_per_step"] for row in of_arm)
        rows.append(
            [
                f"`{arm}`",
                str(len(of_arm)),
                over_seeds(of_arm, "trained"),
                over_seeds(of_arm, "verifier", percent=True),
                over_seeds(of_arm, "clip"),
                over_seeds(of_arm, "hacking_gap"),
                over_seeds(of_arm, "motion", percent=True),
                f"{seconds:.2f}",
            ]
        )
    return f"{_made_on(result)}\n\n{markdown(head, rows)}"


def guidance(result: dict) -> str:
    rows = [row for row in result["rows"] if row["arm"] != "full"]
    head = ["adapter", "steps with gradient", "guidance_gradient", "cosine with full", "length, full = 1"]
    cells = [
        [row["adapter"], str(row["grad_steps"]), row["arm"], f"{row['cosine']:.3f}", f"{row['norm_ratio']:.2f}"]
        for row in rows
    ]
    return f"{_made_on(result)}\n\n{markdown(head, cells)}"


def _made_on(result: dict) -> str:
    about = result["environment"]
    return f"Measured on {about['device']} ({about['cores']} cores), torch {about['torch']}."


def main() -> None:
    text = DOC.read_text(encoding="utf-8")
    for name, table in (("methods", methods), ("guidance", guidance)):
        path = RESULTS / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            text = fill(text, name, table(result))
            text = fill_cells(text, result) if name == "methods" else text
    DOC.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
