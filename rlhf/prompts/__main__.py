"""Find near-duplicate prompts: `python -m rlhf.prompts TRAIN [HELD_OUT ...]`.

Two prompts are too close if they share most of their words; case, order and punctuation do not
count. A held-out prompt close to a training prompt makes an evaluation look too good.
"""

import argparse
import math
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from typing import NamedTuple

from rlhf.config import ConfigError
from rlhf.prompts import BUILT_IN_SETS, load_prompts

# Share of common words: a new subject in a short sentence is below it, one in a long one is not.
NEAR = 0.6
FILLER = re.compile(  # words that name nothing visible
    "an?|the|of|in|on|at|to|from|into|onto|over|under|through|by|with|for|and|or|as|is|are|its?|his|her|their|that|which"
)


class Pair(NamedTuple):
    """Two prompts that are too close, each with the number of its set."""

    first: str
    second: str
    sets: tuple[int, int]
    similarity: float  # Jaccard's, of the words; 1 for the same words


def words(prompt: str) -> frozenset[str]:
    """Return a prompt's words in lower case without fillers, or with them if no other is left."""
    found = re.findall(r"\w+", unicodedata.normalize("NFKC", prompt).casefold())
    return frozenset(word for word in found if not FILLER.fullmatch(word)) or frozenset(found)


def close_pairs(sets: list[list[str]], near: float = NEAR) -> list[Pair]:
    """Return all pairs of prompts whose words have a Jaccard similarity of at least near.

    Pairs come from all prompts of all sets together, in the order of their second prompt. The
    search is exact, by prefix filtering: similar prompts share one of their rarest words (Bayardo,
    Ma and Srikant 2007, "Scaling up all pairs similarity search").
    """
    prompts = [(number, prompt, words(prompt)) for number, prompts in enumerate(sets) for prompt in prompts]
    commonness = Counter(word for _, _, said in prompts for word in said)
    seen_with, pairs = defaultdict(list), []
    for place, (number, prompt, said) in enumerate(prompts):
        by_rarity = sorted(said, key=lambda word: (commonness[word], word))
        rarest = by_rarity[: len(said) - math.ceil(near * len(said) - 1e-9) + 1]
        for other in sorted({other for word in rarest for other in seen_with[word]}):
            its_number, its_prompt, its_words = prompts[other]
            similarity = len(said & its_words) / len(said | its_words)
            if similarity >= near:
                pairs.append(Pair(its_prompt, prompt, (its_number, number), similarity))
        for word in rarest:
            seen_with[word].append(place)
    return pairs


def main(argv: list[str]) -> int:
    """Print near-duplicate prompts; return 0 for none, 1 for some, 2 for an unreadable file."""
    parser = argparse.ArgumentParser(prog="python -m rlhf.prompts", description=__doc__)
    parser.add_argument("files", nargs="+", help="prompt files")
    parser.add_argument("--near", type=float, default=NEAR, help=f"share of common words that is too much ({NEAR})")
    args = parser.parse_args(argv)
    if not 0 < args.near < math.inf:
        parser.error(f"--near: got {args.near}, expected a share above 0, such as {NEAR}; correct it")
    if built_in := BUILT_IN_SETS.keys() & set(args.files):
        parser.error(f"got the built-in set {min(built_in)}, expected files with a prompt a line; name files")
    try:
        sets = [load_prompts(file, None, 0) for file in args.files]
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for file, prompts in zip(args.files, sets, strict=True):
        print(f"{file}: {len(prompts)} prompts, {sum(len(p.split()) for p in prompts) / len(prompts):.1f} words each")
    pairs = close_pairs(sets, args.near)
    for first, second, (one, other), similarity in pairs:
        print(f"{similarity:.0%} the same words:\n  {args.files[one]}: {first}\n  {args.files[other]}: {second}")
    print(f"{len(pairs)} pairs of prompts too close" if pairs else "no two prompts too close")
    return 1 if pairs else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
