"""Compare two models by their videos of eval/generate.py, scored by eval/score.py.

    python eval/compare.py videos/base videos/tuned
    python eval/compare.py videos/base videos/tuned --by shape --json compare.json

Videos are paired by prompt and seed. The seeds of a prompt are averaged, as they are dependent.
Intervals are Student's t intervals of the paired differences, as in a run's report and its
summary.json. p-values are those of the same t test, with Holm's correction for several rewards or
categories.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from rewards.cli.flags import file_to_write
from rewards.cli.table import format_table
from rlhf.evaluation.paired_sets import ALL, compare, read_pairs
from rlhf.evaluation.statistics import INTERVAL
from rlhf.evaluation.video_set import MANIFEST, read_set
from rlhf.generator.files import SamplingDefaults
from rlhf.io import read_lines, read_object, write_json

HEADS = ("prompts", "base", "tuned", "difference", INTERVAL, "better", "p (Holm)", "")
NANO_ATTRIBUTES = ("color", "shape", "motion", "count")


def parse_compare_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command's flags."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="eval/compare.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("base", type=Path, help="scored folder of the first model")
    parser.add_argument("tuned", type=Path, help="scored folder of the second model")
    attributes = ", ".join(NANO_ATTRIBUTES)
    by = f"'category' (of {MANIFEST}), an attribute of nano's prompts ({attributes}),"
    parser.add_argument("--by", help=f"add rows by category: {by} or a file of PROMPT<tab>CATEGORY lines")
    parser.add_argument("--json", type=file_to_write, help="also write the rows to this file")
    return parser.parse_args(argv)


def categories(by: str | None, folder: Path, prompts: list[str]) -> Callable[[str], str] | None:
    """Return the function from prompt to category. Raise ValueError if a prompt has none."""
    if by is None:
        return None
    if by in NANO_ATTRIBUTES:
        return _nano_category(by)
    if by == "category":
        given = [(video.prompt, video.category) for video in read_set(folder)]
        stated = [(prompt, str(category)) for prompt, category in given if category not in (None, "")]
    elif Path(by).is_file():
        stated = [tuple(line.rsplit("\t", 1)) for line in read_lines(Path(by)) if "\t" in line]
    else:
        expected = f"category, one of {', '.join(NANO_ATTRIBUTES)}, or a file"
        raise ValueError(f"--by: got {by!r}, expected {expected}; correct it")
    known = dict(stated)
    if twice := next((prompt for prompt, category in stated if known.get(prompt, category) != category), None):
        raise ValueError(f"--by {by}: got two categories for {twice!r}, expected one; correct one of them")
    without = [prompt for prompt in prompts if prompt not in known]
    if without:
        raise ValueError(f"--by {by}: got no category for {without[0]!r} and {len(without) - 1} more; add them")
    return known.__getitem__


def _nano_category(attribute: str) -> Callable[[str], str]:
    from rlhf.nano import world

    return lambda prompt: world.VALUES[attribute][world.read_caption(prompt)[attribute]]


def describe_sampling(base: Path, tuned: Path) -> list[str]:
    """Return a line for each way in which the videos of two folders were sampled differently."""
    made = [folder / "generate.json" for folder in (base, tuned)]  # of eval/generate.py
    if not all(path.is_file() for path in made):
        return []
    one, two = map(read_object, made)
    names = [field.name for field in fields(SamplingDefaults)]
    differing = [name for name in names if one.get(name) != two.get(name)]
    return [f"Made with another {name}: {one.get(name)}, {two.get(name)}" for name in differing]


def describe(rows: list[dict]) -> str:
    """Return the rows as a table, and how to read it."""
    overall = [row for row in rows if row["category"] == ALL]
    parts, found = len(rows) - len(overall), sum(row["finding"] for row in rows)
    heads = ("reward", *(["category"] if parts else []), *HEADS)
    cells = [(row["reward"], *([row["category"]] if parts else []), *_cells(row)) for row in rows]
    corrected = f"{len(overall)} rewards" + (f" and, apart, {parts} rows of categories" if parts else "")
    return (
        f"{format_table([heads, *cells])}\n\n"
        f"{found} of {len(rows)} rows differ at the 5 % level (*), after Holm's correction for {corrected}.\n"
        "Intervals are not corrected: of twenty, one misses its true value by chance. 'better' is the share of\n"
        "prompts that scored higher, equal ones counting half. 'no spread': all differences are equal."
    )


def _cells(row: dict) -> tuple[str, ...]:
    low, high = row["ci95"]
    return (
        str(row["prompts"]),
        f"{row['base']:.4f}",
        f"{row['tuned']:.4f}",
        f"{row['diff']:+.4f}",
        f"[{low:+.4f}, {high:+.4f}]" if low < high else "no spread" if row["prompts"] > 1 else "-",
        f"{row['win_rate']:.0%}",
        f"{row['p_holm']:.4f}",
        "*" if row["finding"] else "",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    args = parse_compare_args(argv)
    try:
        pairs = read_pairs(args.base, args.tuned)
        rows = compare(pairs, categories(args.by, args.base, pairs.prompts))
        if args.json:
            folders = {"base": str(args.base), "tuned": str(args.tuned)}
            write_json(args.json, folders | {"pairs": pairs.videos, "rows": rows})
    except (ValueError, OSError) as error:
        print(f"eval/compare.py: {error}", file=sys.stderr)
        return 2
    unpaired = f"; {pairs.unpaired} videos have no partner and are left out" if pairs.unpaired else ""
    counts = f"{pairs.videos} pairs of {len(pairs.prompts)} prompts{unpaired}"
    print(f"{args.tuned} against {args.base}: {counts}\n\n{describe(rows)}")
    for line in describe_sampling(args.base, args.tuned):
        print(line)
    for name in pairs.left_out:
        print(f"Left out: {name}, which some videos have no score by; score both folders with it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
