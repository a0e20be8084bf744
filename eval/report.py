"""Write the report of a run, as far as it got - also one that was killed - or write it anew with other videos:

    python eval/report.py runs/nano                                                 writes runs/nano/report.html
    python eval/report.py runs/nano --before videos/base --after videos/tuned       all that eval/generate.py made

Videos are in the file while it stays under --max_mb; those beyond it are referred to where they are.
"""

import argparse
import sys
from pathlib import Path

from rewards.cli.flags import file_to_write
from rlhf.report import MOST_BYTES, write_report
from rlhf.run_folder import run_in


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="eval/report.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("--before", type=Path, help="folder of videos of the first model, scored or not")
    parser.add_argument("--after", type=Path, help="folder of videos of the second model")
    parser.add_argument("--output", type=file_to_write, help="file to write (default: RUN/report.html)")
    default = MOST_BYTES // 10**6
    parser.add_argument("--max_mb", type=float, default=default, help=f"size of the file (default: {default})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    args = parse(argv)
    try:
        if not run_in(args.run):
            raise ValueError(f"{args.run}: got no run there, expected the folder of a training run; correct the path")
        if bool(args.before) != bool(args.after):
            raise ValueError("--before and --after: got one of them, expected both or neither; add the other")
        path = write_report(args.run, args.output, args.before, args.after, args.max_mb * 10**6)
    except (ValueError, OSError) as error:
        print(f"eval/report.py: {error}", file=sys.stderr)
        return 2
    print(f"wrote {path}: {path.stat().st_size / 10**6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
