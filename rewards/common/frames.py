"""Frame sampling: which of the decoded frames a reward scores.

The contract's `frames` ("first", a number of leading frames, "all") says which frames are decoded.
`num_frames` says which of these are scored:

    None         all
    4            four, evenly spaced, including first and last
    "random 4"   four, drawn in each step from (seed, step)
    "8 fps"      eight per second of the video, from the first frame on, by the frames' own times
    "every 8 fps"  every round(fps / 8)-th frame, which may be a little more or less than eight

A video with fewer frames is scored whole.

Shape legend: B batch, C channels, T frames, N scored frames, H height, W width.
"""

import math
import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from rewards.contract import RewardError, check_frames

_FORMS = "a number, 'random 4', '8 fps' or 'every 8 fps' for frames per second, or nothing for every frame"
_CURE = "pass it to the reward as a keyword, as the trainer does: reward(video, prompts, fps=24, seed=0, step=0)"


def pick_frames(reward: Callable, video_BCTHW: torch.Tensor, info: dict) -> torch.Tensor:
    """Return the frames (B, C, N, H, W) that `reward.num_frames` selects, by the call's `info`."""
    chosen = choose_frames(reward.name, reward.num_frames, video_BCTHW.shape[2], info)
    return video_BCTHW if len(chosen) == video_BCTHW.shape[2] else video_BCTHW[:, :, chosen]


def choose_frames(name: str, num_frames: int | str | None, total: int, info: dict) -> list[int]:
    """Return the indices of the frames to score out of `total`: ascending, unique, at least one.

    Rewards of different `name` draw different random frames. info must hold `seed` and `step` for
    random frames, and `fps`, the frame rate of the video, for a rate. Raises RewardError if one is
    missing.
    """
    kind, amount = _parse_num_frames(name, num_frames)
    if kind in ("fps", "every") and total > 1:
        fps = _require_info(name, num_frames, info, "fps")
        if kind == "every":
            return list(range(0, total, max(round(fps / amount), 1)))
        return _indices_at_rate(amount, total, fps, info.get("times"))
    if kind in ("fps", "every"):
        return [0]
    if kind == "all" or amount >= total:
        return list(range(total))
    if kind == "even":
        return evenly_spaced_indices(total, amount)
    seed, step = _require_info(name, num_frames, info, "seed"), _require_info(name, num_frames, info, "step")
    return sorted(random.Random(f"{name} {seed} {step}").sample(range(total), amount))


def evenly_spaced_indices(total: int, count: int | None) -> list[int]:
    """Return `count` evenly spaced indices from first to last; all if count is None or >= total."""
    if count is None or count >= total:
        return list(range(total))
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def check_num_frames(name: str, frames: str | int, num_frames: int | str | None) -> None:
    """Raise RewardError if frames or num_frames is malformed, or if frames < num_frames."""
    check_frames(name, frames)
    kind, amount = _parse_num_frames(name, num_frames)
    decoded = {"first": 1, "all": float("inf")}.get(frames, frames)
    if kind in ("even", "random") and not 1 <= amount <= decoded:
        expected = f"num_frames between 1 and the {decoded} that frames={frames!r} decodes"
        cure = "set frames to 'all' or to a larger number"
        raise RewardError(name, got=f"num_frames={num_frames!r}", expected=expected, cure=cure)


def check_positive(name: str, **settings: float | None) -> None:
    """Raise RewardError for a setting that is neither None nor a number above 0."""
    for key, value in settings.items():
        if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise RewardError(
                name, got=f"{key}={value!r}", expected="a number above 0, where it is set", cure=f"correct {key}"
            )


def require_choice(name: str, setting: str, value: str, choices: Mapping[str, Any]) -> Any:
    """Return choices[value]. Raise RewardError if it is none of them."""
    if value not in choices:
        got, expected = f"{setting}={value!r}", f"one of {', '.join(choices)}"
        raise RewardError(name, got=got, expected=expected, cure=f"correct {setting}")
    return choices[value]


def require_frames(name: str, got: int, least: int) -> None:
    """Raise RewardError if a reward got fewer frames than it needs."""
    if got < least:
        cure = "generate more frames, or leave this reward out for images"
        raise RewardError(name, got=f"{got} frame(s)", expected=f"at least {least}", cure=cure)


def apply_in_chunks(function: Callable, chunk: int | None, *frames_NCHW: torch.Tensor) -> torch.Tensor:
    """Apply the function to chunks of `chunk` rows, recomputed in backward; None: all at once."""
    if chunk is None:
        return function(*frames_NCHW)
    parts = zip(*(frames.split(chunk) for frames in frames_NCHW), strict=True)
    return torch.cat([checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def _parse_num_frames(name: str, num_frames: int | str | None) -> tuple[str, float]:
    """Return the kind of sampling, "all", "even", "random" or "fps", and its number."""
    if num_frames is None:
        return "all", 0
    if isinstance(num_frames, int) and not isinstance(num_frames, bool):
        return "even", num_frames
    if isinstance(num_frames, str) and (found := re.fullmatch(r"random (\d+)", num_frames)):
        return "random", int(found[1])
    found = re.fullmatch(r"(every )?(\d+(?:\.\d+)?) fps", num_frames) if isinstance(num_frames, str) else None
    if found and float(found[2]):
        return "every" if found[1] else "fps", float(found[2])
    raise RewardError(name, got=f"num_frames={num_frames!r}", expected=_FORMS, cure="write it in one of these forms")


def _require_info(name: str, num_frames: str, info: dict, key: str):
    """Return info[key]; raise RewardError if it is missing. num_frames: for the message."""
    if key not in info:
        raise RewardError(name, got=f"no {key}", expected=f"{key}, which num_frames={num_frames!r} needs", cure=_CURE)
    return info[key]


def _indices_at_rate(rate: float, total: int, fps: float, times: list[float] | None) -> list[int]:
    """Return the frames nearest to 0, 1 / rate, ... seconds, each once."""
    if times is not None:
        ticks = range(math.ceil(total / fps * rate))
        return sorted(set(nearest_frames((times[0] + i / rate for i in ticks), times)))
    stride = max(fps / rate, 1)
    return [index for i in range(total) if (index := round(i * stride)) < total]


def nearest_frames(seconds: Iterable[float], times: list[float]) -> list[int]:
    """Return the index of the frame nearest to each second, the earlier of two; times ascend."""
    middles = [(before + after) / 2 for before, after in pairwise(times)]
    return [bisect_left(middles, second) for second in seconds]
