"""Two scored sets of videos, pair by pair: the same prompt and seed from two models. N prompts."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf.reading import read_rows, reading
from rlhf.resampling import LEVEL, compared, holm
from rlhf.video_set import SCORES, Key, numbered

ALL = "all"


@dataclass(frozen=True)
class Pairs:
    """What two models scored on the same prompts; several seeds of a prompt are one number, their mean."""

    prompts: list[str]
    base: dict[str, torch.Tensor]  # (N,) by reward
    tuned: dict[str, torch.Tensor]
    videos: int  # pairs of them
    unpaired: int  # videos without a partner


def read_pairs(base: Path, tuned: Path) -> Pairs:
    """Pair the rows of two scores.jsonl. Raises ValueError if one is absent or they share no pair or no reward."""
    left, right = _rows(base), _rows(tuned)
    keys = [key for key in left if key in right]
    rewards = [
        name for name in next(iter(left.values())) if all(name in row for row in (*left.values(), *right.values()))
    ]
    if not keys or not rewards:
        missing = "prompt and seed" if not keys else "reward that was asked of every video"
        raise ValueError(
            f"{base} and {tuned}: got no {missing} in common, expected some; make both with the same prompts and "
            "seeds, and score both with the same rewards"
        )
    prompts = list(dict.fromkeys(prompt for prompt, *_ in keys))
    means = lambda rows, name: _means(prompts, [(key[0], rows[key][name]) for key in keys])
    return Pairs(
        prompts,
        {name: means(left, name) for name in rewards},
        {name: means(right, name) for name in rewards},
        len(keys),
        len(left) + len(right) - 2 * len(keys),
    )


def compare(pairs: Pairs, category_of: Callable[[str], str] | None = None, seed: int = 0) -> list[dict]:
    """A row for each reward over all prompts, then for each reward and category, as `compared` gives them.

    Each has "reward", "category", "prompts" besides, and "p_holm": its p-value for looking at as many rows - of all
    prompts, or of the categories - at once. "finding": whether that is below 5 %.
    """
    groups = {ALL: list(range(len(pairs.prompts)))}
    overall = [_row(pairs, name, ALL, groups[ALL], seed) for name in pairs.base]
    if category_of is None:
        return _corrected(overall)
    for i, prompt in enumerate(pairs.prompts):
        groups.setdefault(category_of(prompt), []).append(i)
    names = sorted(name for name in groups if name != ALL)
    parts = [_row(pairs, reward, name, groups[name], seed) for reward in pairs.base for name in names]
    return _corrected(overall) + _corrected(parts)


def _row(pairs: Pairs, reward: str, category: str, rows: list[int], seed: int) -> dict:
    result = compared(pairs.base[reward][rows], pairs.tuned[reward][rows], seed)
    return {"reward": reward, "category": category, "prompts": len(rows)} | result


def _corrected(rows: list[dict]) -> list[dict]:
    adjusted = holm([row["p"] for row in rows])
    return [row | {"p_holm": p, "finding": p < LEVEL} for row, p in zip(rows, adjusted, strict=True)]


def _rows(folder: Path) -> dict[Key, dict[str, float]]:
    path = Path(folder) / SCORES
    if not path.is_file():
        raise ValueError(f"{path}: got no file there, expected the scores of a folder; run eval/score.py on it")
    scores = read_scores(path)
    if not scores:
        raise ValueError(f"{path}: got no scores, expected some; run eval/score.py on the folder")
    for (prompt, *_), row in scores.items():
        if broken := [name for name, score in row.items() if not math.isfinite(score)]:
            got = f"{broken[0]}={row[broken[0]]} for {prompt!r}"
            raise ValueError(
                f"{path}: got {got}, expected finite scores; score the folder anew, or leave the video out"
            )
    return scores


def read_scores(path: Path) -> dict[Key, dict[str, float]]:
    """What a scores.jsonl says of each video, by reward. Raises DamagedFileError."""
    rows = read_rows(path)
    with reading(path):
        keys = numbered((row["prompt"], row["seed"]) for row in rows)
        scores = [{name: float(score) for name, score in row["scores"].items()} for row in rows]
    return dict(zip(keys, scores, strict=True))


def _means(prompts: list[str], values: list[tuple[str, float]]) -> torch.Tensor:
    """(N,) float64: the mean of each prompt's values."""
    by_prompt: dict[str, list[float]] = {}
    for prompt, value in values:
        by_prompt.setdefault(prompt, []).append(value)
    return torch.tensor([sum(by_prompt[p]) / len(by_prompt[p]) for p in prompts], dtype=torch.float64)
