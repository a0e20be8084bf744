"""Two scored video sets, paired by prompt and seed. N prompts."""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from rlhf.evaluation.statistics import LEVEL, holm_correction, paired_test
from rlhf.evaluation.video_set import SCORES, Key, pair_keys
from rlhf.io import file_errors, read_rows

ALL = "all"  # the category of every prompt


@dataclass(frozen=True)
class Pairs:
    """The scores of two models on the same prompts, averaged over the seeds of each prompt."""

    prompts: list[str]
    base: dict[str, torch.Tensor]  # (N,) by reward
    tuned: dict[str, torch.Tensor]
    videos: int  # pairs of videos
    unpaired: int  # scored videos without a partner
    left_out: tuple[str, ...] = ()  # rewards without a score for every video


def read_pairs(base: Path, tuned: Path) -> Pairs:
    """Pair the scores of two scores.jsonl by prompt, averaged over the prompt's seeds.

    Videos that repeat prompt and seed may differ in their rows or noise. They have partners only
    if the other set has as many of them: the mean is then the same in any order.

    Raises ValueError if a file is absent, if the two are one folder, if they share no pair or no
    reward, or if a reward scored them under different conditions.
    """
    if base.resolve() == tuned.resolve():
        raise ValueError(f"{base} and {tuned}: got one folder twice, expected those of two models; correct one")
    left, right = _read_finite_scores(base), _read_finite_scores(tuned)
    counts = [Counter(key[:2] for key in scores) for scores in (left, right)]
    keys = [key for key in left if key in right and counts[0][key[:2]] == counts[1][key[:2]]]
    rows = (*left.values(), *right.values())
    scored = dict.fromkeys(name for row in rows for name in row)
    rewards = [name for name in scored if all(name in row for row in rows)]
    if not keys or not rewards:
        missing = "prompt and seed" if not keys else "reward with a score for every video"
        raise ValueError(
            f"{base} and {tuned}: got no {missing} in common, expected some; make both with the same "
            "prompts and seeds, and score both with the same rewards"
        )
    for name in rewards:
        _require_equal_conditions(base, tuned, name)
    prompts = list(dict.fromkeys(prompt for prompt, *_ in keys))
    means = lambda scores, name: _prompt_means(prompts, [(key[0], scores[key][name]) for key in keys])
    return Pairs(
        prompts,
        {name: means(left, name) for name in rewards},
        {name: means(right, name) for name in rewards},
        len(keys),
        len(left) + len(right) - 2 * len(keys),
        tuple(name for name in scored if name not in rewards),
    )


def compare(pairs: Pairs, category_of: Callable[[str], str] | None = None) -> list[dict]:
    """Return a row for each reward over all prompts, then for each reward and category.

    A row is that of `paired_test` with "reward", "category" and "prompts", their number. "p_holm"
    is its p-value after Holm's correction for all rows of its kind (all prompts or categories), and
    "finding" says whether that is below 5 %.
    """
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(pairs.prompts if category_of else []):
        groups.setdefault(category_of(prompt), []).append(i)
    overall = [_row(pairs, reward, ALL, list(range(len(pairs.prompts)))) for reward in pairs.base]
    names = sorted(name for name in groups if name != ALL)
    parts = [_row(pairs, reward, name, groups[name]) for reward in pairs.base for name in names]
    return _with_holm(overall) + _with_holm(parts)


def _row(pairs: Pairs, reward: str, category: str, indices: list[int]) -> dict:
    """Return the row of `compare` for one reward over the pairs at `indices`."""
    result = paired_test(pairs.base[reward][indices], pairs.tuned[reward][indices])
    return {"reward": reward, "category": category, "prompts": len(indices)} | result


def _with_holm(rows: list[dict]) -> list[dict]:
    """Return the rows with "p_holm" and "finding"."""
    adjusted = holm_correction([row["p"] for row in rows])
    return [row | {"p_holm": p, "finding": p < LEVEL} for row, p in zip(rows, adjusted, strict=True)]


def _read_finite_scores(folder: Path) -> dict[Key, dict[str, float]]:
    """Return a folder's scores by video; raise ValueError if absent, empty or not finite."""
    path = Path(folder) / SCORES
    if not path.is_file():
        raise ValueError(f"{path}: got no file there, expected the scores of a folder; run eval/score.py on it")
    scores = read_scores(path)
    if not scores:
        raise ValueError(f"{path}: got no scores, expected some; run eval/score.py on the folder")
    for (prompt, *_), row in scores.items():
        for name, score in row.items():
            if not math.isfinite(score):
                raise ValueError(
                    f"{path}: got {name}={score} for {prompt!r}, expected finite scores; score the "
                    "folder again, or leave the video out"
                )
    return scores


def _require_equal_conditions(base: Path, tuned: Path, reward: str) -> None:
    """Raise ValueError unless a reward scored both folders with one code, settings and weights.

    Files of older versions do not say how they were scored.
    """
    paths = [Path(folder) / SCORES for folder in (base, tuned)]
    stated = [
        (path, json.dumps(row["conditions"][reward], sort_keys=True))
        for path in paths
        for row in read_rows(path)
        if reward in row.get("conditions", {})
    ]
    for path, conditions in stated:
        if conditions != stated[0][1]:
            raise ValueError(
                f"{path}: got {reward} scored with {conditions}, expected {stated[0][1]}, as in "
                f"{stated[0][0]}; score both folders again with the same settings and weights"
            )


def read_scores(path: Path) -> dict[Key, dict[str, float]]:
    """Return the scores of each video in a scores.jsonl, by reward. Raise DamagedFileError.

    Videos that could not be scored are left out.
    """
    rows = read_rows(path)
    with file_errors(path):
        keys = pair_keys((row["prompt"], row["seed"]) for row in rows)
        pairs = [(key, row["scores"]) for key, row in zip(keys, rows, strict=True) if "error" not in row]
        return {key: {name: float(score) for name, score in scores.items()} for key, scores in pairs}


def _prompt_means(prompts: list[str], values: list[tuple[str, float]]) -> torch.Tensor:
    """Return the mean of each prompt's values, (N,) float64."""
    by_prompt: dict[str, list[float]] = {}
    for prompt, value in values:
        by_prompt.setdefault(prompt, []).append(value)
    return torch.tensor([fmean(by_prompt[prompt]) for prompt in prompts], dtype=torch.float64)
