"""Is the second model better than the first? Both were made with eval/generate.py and scored with eval/score.py:

    python eval/compare.py videos/base videos/tuned
    python eval/compare.py videos/base videos/tuned --by shape --json compare.json

Videos are paired by prompt and seed; the seeds of a prompt count as one, since they are not independent. Intervals are
bootstrapped over prompts; p-values are of a sign-flip test, corrected for looking at several rewards or categories.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from rewards.cli.flags import file_to_write
from rewards.cli.table import format_table
from rlhf.compare_sets import ALL, compare, read_pairs
from rlhf.video_set import MANIFEST, read_set

HEADS = ("prompts", "base", "tuned", "difference", "95 % interval", "better", "95 % interval", "p (Holm)", "")
NANO_ATTRIBUTES = ("color", "shape", "motion", "count")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="eval/compare.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("base", type=Path, help="scored folder of the first model")
    parser.add_argument("tuned", type=Path, help="scored folder of the second model")
    attributes = ", ".join(NANO_ATTRIBUTES)
    by = f"rows by category, too: 'category' (as {MANIFEST} says), one of nano's attributes ({attributes}),"
    parser.add_argument("--by", help=f"{by} or a file with PROMPT<tab>CATEGORY a line")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (default: 0)")
    parser.add_argument("--json", type=file_to_write, help="write the rows to this file, too")
    return parser.parse_args(argv)


def categories(by: str | None, folder: Path, prompts: list[str]) -> Callable[[str], str] | None:
    """From a prompt to its category. Raises ValueError if a prompt has none."""
    if by is None:
        return None
    if by in NANO_ATTRIBUTES:
        return _of_nano(by)
    if by == "category":
        known = {video.prompt: video.category for video in read_set(folder) if video.category}
    elif Path(by).is_file():
        lines = Path(by).read_text(encoding="utf-8").splitlines()
        known = dict(line.rsplit("\t", 1) for line in lines if "\t" in line)
    else:
        expected = f"category, one of {', '.join(NANO_ATTRIBUTES)}, or a file"
        raise ValueError(f"--by: got {by!r}, expected {expected}; correct it")
    without = [prompt for prompt in prompts if prompt not in known]
    if without:
        raise ValueError(f"--by {by}: got no category for {without[0]!r} and {len(without) - 1} more; add them")
    return known.__getitem__


def _of_nano(attribute: str) -> Callable[[str], str]:
    from rlhf.nano import world

    values = {"color": list(world.COLORS), "shape": world.SHAPES, "motion": world.MOTIONS, "count": world.COUNTS}
    return lambda prompt: values[attribute][world.read_caption(prompt)[attribute]]


def describe(rows: list[dict]) -> str:
    """The rows as a table, and what to make of them."""
    of_all = [row for row in rows if row["category"] == ALL]
    parts, found = len(rows) - len(of_all), sum(row["finding"] for row in rows)
    heads = ("reward", *(["category"] if parts else []), *HEADS)
    cells = [(row["reward"], *([row["category"]] if parts else []), *_cells(row)) for row in rows]
    corrected = f"{len(of_all)} rewards" + (f" and, apart, {parts} rows of categories" if parts else "")
    return (
        f"{format_table([heads, *cells])}\n\n"
        f"{found} of {len(rows)} rows differ at the 5 % level (*), after Holm's correction for {corrected}.\n"
        "Intervals are not corrected: of twenty, one misses its true value by chance. 'better' is the share of\n"
        "prompts that scored higher, equal ones counting half."
    )


def _cells(row: dict) -> tuple[str, ...]:
    low, high = row["ci95"]
    win_low, win_high = row["win_rate_ci95"]
    return (
        str(row["prompts"]),
        f"{row['base']:.4f}",
        f"{row['tuned']:.4f}",
        f"{row['diff']:+.4f}",
        f"[{low:+.4f}, {high:+.4f}]" if row["prompts"] > 1 else "-",
        f"{row['win_rate']:.0%}",
        f"[{win_low:.0%}, {win_high:.0%}]" if row["prompts"] > 1 else "-",
        f"{row['p_holm']:.4f}",
        "*" if row["finding"] else "",
    )


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    args = parse(argv)
    try:
        pairs = read_pairs(args.base, args.tuned)
        rows = compare(pairs, categories(args.by, args.base, pairs.prompts), args.seed)
    except (ValueError, OSError) as error:
        print(f"eval/compare.py: {error}", file=sys.stderr)
        return 2
    alone = f"; {pairs.unpaired} videos have no partner and are left out" if pairs.unpaired else ""
    print(f"{args.tuned} against {args.base}: {pairs.videos} pairs of {len(pairs.prompts)} prompts{alone}\n")
    print(describe(rows))
    if args.json:
        result = {"base": str(args.base), "tuned": str(args.tuned), "pairs": pairs.videos, "rows": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
