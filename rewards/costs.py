"""What a built-in reward will take, from what was measured of it. Plain data: nothing is imported or loaded."""

import math
import re
from dataclasses import dataclass

from rewards.catalogue import CATALOGUE
from rewards.measured import COSTS

GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """Bytes of the weights; bytes besides, and seconds on `rewards.measured.DEVICE`, of scoring and going back."""

    weights: int
    memory: int
    seconds: float


def decoded_frames(name: str, settings: dict, total: int) -> int:
    """Leading frames of a video of `total` frames that a built-in reward with these settings has decoded."""
    frames = settings.get("frames", "first" if CATALOGUE[name].frames.startswith("first") else "all")
    return {"first": 1, "all": total}.get(frames) or min(frames, total)


def scored_frames(name: str, settings: dict, decoded: int, fps: float) -> int:
    """How many of the decoded frames it scores."""
    default = CATALOGUE[name].frames  # such as "first", "all", "3 of all" or "all, at 8 a second"
    asked = settings.get("num_frames", settings.get("max_frames", default))
    number = re.search(r"\d+(\.\d+)?", str(asked))
    if number is None:
        return decoded
    by_rate = "fps" in str(asked) or "a second" in str(asked)
    count = math.ceil(decoded * float(number[0]) / fps) if by_rate else int(number[0])
    return max(1, min(count, decoded))


def cost(name: str, settings: dict, frames: int) -> Cost | None:
    """What a batch takes of which so many frames are scored in all; None for a reward that was not measured.

    Straight lines through what was measured of 1 and 8 frames; in proportion, from 8 on, where 1 was not.
    """
    default = "bfloat16" if CATALOGUE[name].bytes_each == 2 else "float32"
    if (row := COSTS.get((name, settings.get("dtype", default)))) is None:
        return None
    weights, of_frames = row
    seconds, memory = (_line({n: both[i] for n, both in of_frames.items()}, frames) for i in (0, 1))
    return Cost(int(weights * GIB), int(memory * GIB), seconds)


def _line(measured: dict[int, float], frames: int) -> float:
    least, most = min(measured), max(measured)
    if least == most:
        return measured[most] * max(1.0, frames / most)
    slope = max(0.0, (measured[most] - measured[least]) / (most - least))
    return measured[least] + slope * (frames - least)
