"""Write the report of a run, also of one that was killed, or write it again with other videos.

    python eval/report.py runs/nano                                           runs/nano/report.html
    python eval/report.py runs/nano --before videos/base --after videos/tuned     with these videos

Videos are embedded until the file has --max_mb; the page refers to the others where they are.
"""

import argparse
import sys
from pathlib import Path

from rewards.cli.flags import file_to_write, number
from rlhf.report import MAX_BYTES, write_report
from rlhf.run.folder import has_run


def parse_report_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command's flags."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="eval/report.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("--before", type=Path, help="folder of videos of the first model, scored or not")
    parser.add_argument("--after", type=Path, help="folder of videos of the second model")
    parser.add_argument("--output", type=file_to_write, help="file to write (default: RUN/report.html)")
    default = MAX_BYTES // 10**6
    parser.add_argument("--max_mb", type=number, default=default, help=f"size of the file, MB (default: {default})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    args = parse_report_args(argv)
    try:
        if not has_run(args.run):
            expected = "expected the folder of a training run"
            raise ValueError(f"{args.run}: got no run there, {expected}; correct the path")
        if bool(args.before) != bool(args.after):
            expected = "expected both or neither; add the other"
            raise ValueError(f"--before and --after: got one of them, {expected}")
        path = write_report(args.run, args.output, args.before, args.after, args.max_mb * 10**6)
    except (ValueError, OSError) as error:
        print(f"eval/report.py: {error}", file=sys.stderr)
        return 2
    print(f"wrote {path}: {path.stat().st_size / 10**6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
