"""A cache of scores, keyed by file content, prompt with its row, and the reward with its settings.

A reward is loaded only if one of its scores is missing.
"""

import hashlib
import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path

from rewards.catalogue import CATALOGUE
from rewards.contract import is_url, reward_name, split_spec
from rewards.load import check_spec, named_files, source_digests
from rewards.placement import without_device
from rewards.score import NotScoredError, by_name, load_rewards, score
from rlhf.io import file_fingerprint, write_whole
from rlhf.types import fields_of, row_of

CACHE_VARIABLE = "CONTENTV_RLHF_CACHE"
SCORES_VERSION = 4  # to be raised with every change of a built-in's score, or of how files are read


def default_cache_folder(kind: str = "scores") -> Path:
    """Return $CONTENTV_RLHF_CACHE/KIND, by default ~/.cache/contentv-rlhf/KIND."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "contentv-rlhf") / kind


class ScoreCache:
    """A folder with one small file for each score; atomic writes, so processes can share it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, key: str) -> float | None:
        """Return the score of a key, None if there is none."""
        try:
            return json.loads(self._path(key).read_text())["score"]
        except (OSError, ValueError, KeyError):  # absent or damaged
            return None

    def put(self, key: str, score: float) -> None:
        """Keep a score."""
        with write_whole(self._path(key), shared=True) as unfinished:
            unfinished.write_text(json.dumps({"score": score}))

    def _path(self, key: str) -> Path:
        """Return the file of a key's score."""
        return self.folder / key[:2] / f"{key}.json"


class Scorer:
    """Scores files with rewards and a cache.

    specs are names or specs of rewards; kwargs is {name: arguments}; reading is max_frames, fps and
    allow_truncated of `read_video`. Raises RewardError for a spec that can't name a reward, and
    ValueError for a name given twice.
    """

    def __init__(self, specs: list[str], kwargs: dict, cache: ScoreCache, device: str, **reading):
        self.specs, self.kwargs, self.cache = by_name(specs), kwargs, cache
        for spec in specs:
            check_spec(spec)
        reading = {"max_frames": None, "fps": None, "allow_truncated": False} | reading
        self.settings = Namespace(device=device, **reading)
        self.identities = {
            name: reward_identity(spec, kwargs.get(name, {}), reading) for name, spec in self.specs.items()
        }
        self.conditions = {
            name: score_conditions(spec, kwargs.get(name, {}), reading["max_frames"])
            for name, spec in self.specs.items()
        }
        self._loaded: dict[str, Callable] = {}

    def __call__(self, path: Path, prompt: str) -> dict:
        """Return {"scores": {name: score}} of a file, and "missing" of one that was cut short.

        Raises NotScoredError if the file can't be scored. Scores of files that were cut short are
        not kept.
        """
        try:
            content = content_sha256(path)
        except OSError as error:
            raise NotScoredError(f"{path}: got no right to read it, or no file ({error.strerror})") from error
        row = json.dumps(row_of(prompt), sort_keys=True) if fields_of(prompt) else prompt
        # Built-ins read no row.
        asked = {name: prompt if split_spec(spec)[1] in CATALOGUE else row for name, spec in self.specs.items()}
        keys = {name: digest(content, asked[name], identity) for name, identity in self.identities.items()}
        known = {name: self.cache.get(key) for name, key in keys.items()}
        unknown = [name for name, value in known.items() if value is None]
        new = score(self._rewards(unknown), path, prompt, self.settings) if unknown else {"scores": {}}
        if new.get("missing"):
            return {"scores": known | new["scores"], "missing": new["missing"]}
        for name, value in new["scores"].items():
            self.cache.put(keys[name], value)
        return {"scores": known | new["scores"]}

    def _rewards(self, names: Iterable[str]) -> dict[str, Callable]:
        """Return the rewards of these names; load those that have not been used yet."""
        for name in names:
            if name not in self._loaded:
                kwargs = {name: self.kwargs[name]} if name in self.kwargs else {}
                self._loaded |= load_rewards([self.specs[name]], kwargs)
        return {name: self._loaded[name] for name in names}


def reward_identity(spec: str, kwargs: dict, reading: dict | None = None) -> str:
    """Return a text that changes with a reward's spec, settings, source file or weights files.

    It changes also with how files are read.

    Files and folders named in settings count as `rlhf.io.describe_files` says. Code that a reward
    imports does not count. A server counts by the reward that it serves.
    """
    name, spec = split_spec(spec)
    if is_url(spec):
        return json.dumps([SCORES_VERSION, source_digests([f"{name}={spec}"], kwargs={name: kwargs}), reading])
    source, kwargs = source_digests([spec]).get(reward_name(spec), ""), without_device(kwargs)
    return json.dumps([SCORES_VERSION, spec, kwargs, reading, source, named_files(kwargs)], sort_keys=True)


def score_conditions(spec: str, kwargs: dict, max_frames: int | None) -> dict:
    """Return what scores of two folders must share to be compared.

    Where the code of a reward lies, and how its videos are stored, may differ.
    """
    name, spec = split_spec(spec)
    if is_url(spec):
        served = source_digests([f"{name}={spec}"], kwargs={name: kwargs})[name][:12]
        limit = {"max_frames": max_frames} if max_frames else {}
        return {"version": SCORES_VERSION, "reward": f"served {served}"} | limit
    where, _, attribute = spec.rpartition(":")
    conditions: dict = {"version": SCORES_VERSION, "reward": spec}
    if Path(where).suffix == ".py":
        conditions["reward"] = f"{Path(where).name}:{attribute}"
    if source := source_digests([spec]).get(reward_name(spec)):
        conditions["source"] = source[:12]
    given = {"kwargs": without_device(kwargs), "files": named_files(kwargs), "max_frames": max_frames}
    return conditions | {name: value for name, value in given.items() if value}


def content_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, or of a folder's names and bytes."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        return digest(*(text for file in files for text in (file.name, file_fingerprint(file)["sha256"])))
    return file_fingerprint(path)["sha256"]


def digest(*parts: str) -> str:
    """Return the SHA-256 of the texts in this order."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
