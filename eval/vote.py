"""Vote blind between two sets of videos, as eval/generate.py writes them.

    python eval/vote.py videos/base videos/tuned
    python eval/vote.py videos/base videos/tuned --output votes.json --port 8000

Serves a page on this machine. Videos are paired by prompt and seed, and shown in a random order.
Which side is which is drawn for each pair and told after its vote. Votes are in OUTPUT, with the
settings of both sets and the win rate; a second start goes on.
"""

import argparse
import random
import sys
from pathlib import Path

from rewards.cli.flags import file_to_write
from rlhf.page.server import add_address_flags, bind, serve
from rlhf.page.sets import SetsApp
from rlhf.page.votes import Votes


def parse_vote_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command's flags."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="eval/vote.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("base", type=Path, help="folder of the first model")
    parser.add_argument("tuned", type=Path, help="folder of the second model")
    output = "file of the votes (default: %(default)s)"
    parser.add_argument("--output", type=file_to_write, default="votes.json", help=output)
    add_address_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    args = parse_vote_args(argv)
    try:
        app = SetsApp({"base": args.base, "tuned": args.tuned}, Votes(args.output), random.Random())
        serve(bind(args.host, args.port), app)
    except (ValueError, OSError) as error:
        print(f"eval/vote.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
