"""The page of two sets of videos, as eval/generate.py writes them: a blind vote on each pair."""

import random
from pathlib import Path

from rlhf.evaluation.generate import SETTINGS_FILE
from rlhf.evaluation.video_set import pair_videos, read_set, require_files
from rlhf.io import read_object
from rlhf.page.votes import MODELS, Pair, Votes, describe_pair


class SetsApp:
    """Two folders of videos, paired by prompt and seed, in an order drawn once.

    Raises ValueError if a folder has no videos, or the two have no pair.
    """

    def __init__(self, folders: dict[str, Path], votes: Votes, order: random.Random):
        self.votes, self.actions = votes, {"vote": self.vote, "next": self.next}
        if folders["base"].resolve() == folders["tuned"].resolve():
            raise ValueError(f"{folders['tuned']}: got the same folder twice, expected two; correct one")
        base, tuned = (read_set(folders[model]) for model in MODELS)
        for videos in (base, tuned):
            require_files(videos)
        pairs = pair_videos(base, tuned)
        if not pairs:
            got = f"{folders['base']} and {folders['tuned']}: got no prompt and seed in common"
            raise ValueError(f"{got}, expected some; make both with the same prompts, in one order, and seeds")
        self.unpaired = len(base) + len(tuned) - 2 * len(pairs)
        self.settings = {model: _settings_of(folder) for model, folder in folders.items()}
        self.pairs = [
            Pair(
                {"prompt": str(key[0]), "seed": key[1]} | ({"repeat": key[2]} if key[2] else {}),
                self.settings,
                {model: video.path for model, video in zip(MODELS, pair, strict=True)},
            )
            for key, pair in pairs.items()
        ]
        order.shuffle(self.pairs)
        self.shown: Pair | None = None
        self.next({})

    def next(self, body: dict) -> None:
        """Show the next pair without a vote; None after the last."""
        self.shown = next((pair for pair in self.pairs if not self.votes.vote_of(pair)), None)
        if self.shown:
            self.votes.add(self.shown)

    def vote(self, body: dict) -> None:
        """Take the vote on a pair."""
        self.votes.vote(body.get("pair"), body.get("choice"))

    def state(self) -> dict:
        """Return what the page shows."""
        done = sum(self.votes.vote_of(pair) is not None for pair in self.pairs)
        sets = {"done": done, "total": len(self.pairs), "unpaired": self.unpaired}
        sets["folders"] = {model: settings["folder"] for model, settings in self.settings.items()}
        pair = self.shown and describe_pair(self.votes, self.shown)
        return {"sets": sets, "pair": pair, "result": self.votes.result(self.settings)}

    def video(self, key: str, side: str) -> Path | None:
        """Return the file on a side of a pair that was shown."""
        return self.votes.file(key, side)


def _settings_of(folder: Path) -> dict:
    """Return the folder's path and its generate.json, if it has one."""
    made = folder / SETTINGS_FILE
    return {"folder": str(folder.resolve())} | (read_object(made) if made.is_file() else {})
