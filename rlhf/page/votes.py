"""Blind votes between two videos of one prompt and one noise, and the win rate that they give.

Which side shows the tuned model is drawn for each pair and told after its vote. Votes are in one
JSON file. Comparisons are kept apart: each has its own two sets of settings, and its own win rate.
"""

import hashlib
import json
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

from rlhf.evaluation.statistics import WILSON, wilson_interval
from rlhf.io import file_errors, read_object, write_json

MODELS = ("base", "tuned")
SIDES = ("left", "right")
TIE = "tie"
OF_A_VOTE = ("left", "chosen", "time")  # the other values of a vote are those of its videos


@dataclass(frozen=True)
class Pair:
    """Two videos of one prompt and noise. settings, files: by model."""

    video: dict  # the prompt, the seed and what else the two share
    settings: dict[str, dict]
    files: dict[str, Path]

    @property
    def key(self) -> str:
        """Return a name of the pair that does not tell its sides."""
        return hashlib.sha256(json.dumps([self.video, self.settings], sort_keys=True).encode()).hexdigest()[:16]


class VoteError(ValueError):
    """A vote that does not count."""


class Votes:
    """The votes of a file, and the sides on which each pair is shown.

    path: the file, which is read if it exists. draw: a number in [0, 1) for each new pair.

    Raises DamagedFileError for a file that holds something else.
    """

    def __init__(self, path: Path, draw: Callable[[], float] = random.random):
        self.path, self.draw, self.pairs, self.sides = path, draw, {}, {}
        self.comparisons: list[dict] = []
        self.lock = threading.Lock()  # requests come on threads
        if path.is_file():
            content = read_object(path)
            with file_errors(path):
                for found in content["comparisons"]:
                    settings, votes = {model: dict(found[model]) for model in MODELS}, found["votes"]
                    if any(vote["chosen"] not in (*MODELS, TIE) for vote in votes):
                        raise ValueError("a vote for neither side")
                    self.comparisons.append(settings | {"votes": [dict(vote) for vote in votes]})

    def add(self, pair: Pair) -> str:
        """Show a pair: draw its sides, unless it was shown before. Return its key."""
        if pair.key not in self.pairs:
            vote = self.vote_of(pair)
            left = vote["left"] if vote else MODELS[self.draw() < 0.5]
            self.sides[pair.key] = {"left": left, "right": MODELS[left == "base"]}
        self.pairs[pair.key] = pair
        return pair.key

    def vote_of(self, pair: Pair) -> dict | None:
        """Return the vote on a pair, None if there is none yet."""
        votes = (self._find(pair.settings) or {"votes": []})["votes"]
        of_video = lambda vote: {name: value for name, value in vote.items() if name not in OF_A_VOTE}
        return next((vote for vote in votes if of_video(vote) == pair.video), None)

    def vote(self, key: str, choice: str) -> None:
        """Store the vote for "left", "right" or "tie", on disk before it is told.

        Raises VoteError for another choice, an unknown pair, and a second vote on a pair.
        """
        if choice not in (*SIDES, TIE):
            raise VoteError(f"choice: got {choice!r}, expected left, right or tie; choose one")
        if not isinstance(key, str) or key not in self.pairs:
            raise VoteError(f"pair: got {key!r}, expected one that was shown; load the page again")
        with self.lock:
            self._store(self.pairs[key], self.sides[key], choice)

    def _store(self, pair: Pair, sides: dict[str, str], choice: str) -> None:
        """Store a vote. Raise VoteError for a second one on the pair."""
        if self.vote_of(pair):
            raise VoteError("got a second vote on this pair, expected one; the sides are told after the first")
        comparison = self._find(pair.settings)
        if comparison is None:
            comparison = {**pair.settings, "votes": []}
            self.comparisons.append(comparison)
        chosen = sides.get(choice, TIE)
        when = datetime.now(UTC).isoformat(timespec="seconds")
        comparison["votes"].append(pair.video | {"left": sides["left"], "chosen": chosen, "time": when})
        try:
            self.save()
        except OSError as error:
            comparison["votes"].pop()
            raise VoteError(
                f"{self.path}: got {error}, expected to write the vote; make room, then vote again"
            ) from error

    def save(self) -> None:
        """Write the file: each comparison's two settings, its result and its votes."""
        rows = [{**{m: c[m] for m in MODELS}, **result_of(c["votes"]), "votes": c["votes"]} for c in self.comparisons]
        write_json(self.path, {"interval": WILSON, "comparisons": rows})

    def result(self, settings: dict[str, dict]) -> dict:
        """Return `result_of` the comparison with these settings of both models."""
        return result_of((self._find(settings) or {"votes": []})["votes"])

    def file(self, key: str, side: str) -> Path | None:
        """Return the video on a side of a pair that was shown; None without one."""
        return self.pairs[key].files.get(self.sides[key].get(side)) if key in self.pairs else None

    def _find(self, settings: dict[str, dict]) -> dict | None:
        """Return the comparison with these settings of both models, None if there is none."""
        return next((c for c in self.comparisons if all(c[model] == settings[model] for model in MODELS)), None)


def describe_pair(votes: Votes, pair: Pair, tell: bool = False) -> dict:
    """Return what the page may know of a pair: its sides and settings only after the vote.

    tell: they may be known before, and there is no vote.
    """
    vote, key = votes.vote_of(pair), pair.key
    known = {"sides": votes.sides[key], "settings": pair.settings} if vote or tell else {}
    return {"key": key, **pair.video, **known, "chosen": vote and vote["chosen"]}


def result_of(votes: list[dict]) -> dict:
    """Return the win rate of the tuned model and its interval; a tie counts half.

    {"tuned_better", "equal", "base_better": numbers of votes, "prompts": their number, "win_rate":
    None without votes, "ci95": [low, high]}. The votes on videos of one prompt are dependent, so
    they are averaged first, and the interval is that of the prompts.
    """
    worth, by_prompt = {"tuned": 1.0, TIE: 0.5, "base": 0.0}, {}
    for vote in votes:
        by_prompt.setdefault(vote["prompt"], []).append(worth[vote["chosen"]])
    rate = fmean(map(fmean, by_prompt.values())) if votes else None
    counts = [sum(vote["chosen"] == chosen for vote in votes) for chosen in ("tuned", TIE, "base")]
    named = dict(zip(("tuned_better", "equal", "base_better"), counts, strict=True))
    interval = wilson_interval(rate or 0.0, len(by_prompt))
    return named | {"prompts": len(by_prompt), "win_rate": rate, "ci95": interval}
