"""Memory and time of the built-in rewards, interpolated between measurements."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from rewards.catalogue import CATALOGUE

GIB = 2**30
# Written by `python bench/reward_costs.py --package`: the device, the size of the one video, and by
# "reward dtype" GiB of weights and {frames: [seconds, peak GiB above the weights]}.
COSTS_FILE = Path(__file__).with_suffix(".json")
OF_PAIRS = {"motion_degree"}  # rewards that score pairs of adjacent frames
COSTS = json.loads(COSTS_FILE.read_text())["costs"]


@dataclass(frozen=True)
class RewardCost:
    """The cost of scoring a batch, forward and backward."""

    weight_bytes: int
    peak_bytes: int  # above the weights
    seconds: float  # on the device of `COSTS_FILE`


def decoded_frames(name: str, settings: dict, total: int) -> int:
    """Return how many leading frames of `total` a built-in reward needs; 0 if it scores latents."""
    if CATALOGUE[name].input.startswith("latents"):
        return 0
    frames = settings.get("frames", "first" if CATALOGUE[name].frames.startswith("first") else "all")
    return {"first": 1, "all": total}.get(frames) or min(frames, total)


def scored_frames(name: str, settings: dict, decoded: int, fps: float) -> int:
    """Return how many of the decoded frames a built-in reward scores."""
    default = CATALOGUE[name].frames  # such as "first", "all", "3 of all" or "all, at 8 a second"
    wanted = str(settings.get("num_frames", settings.get("max_frames", default)))
    number = re.search(r"\d+(\.\d+)?", wanted)
    if number is None:
        return decoded
    is_rate = "fps" in wanted or "a second" in wanted
    count = math.ceil(decoded * float(number[0]) / fps) if is_rate else int(number[0])
    return max(1, min(count, decoded))


def reward_cost(name: str, settings: dict, frames: int) -> RewardCost | None:
    """Return the cost of a batch with `frames` scored frames; None for an unmeasured reward.

    Costs are linear in the frames, through the measurements of 1 and 8 frames. Where 1 frame was
    not measured, they are proportional to the frames from 8 frames on, and constant below.

    The peak is that of one `chunk` of frames or of pairs of frames. Recomputing the chunks
    adds a third of the time. Rewards that chunk by whole videos are costed as without `chunk`.
    """
    default = "bfloat16" if CATALOGUE[name].bytes_each == 2 else "float32"
    if (row := COSTS.get(f"{name} {settings.get('dtype', default)}")) is None:
        return None
    seconds, peak_gib = ({int(n): pair[i] for n, pair in row["frames"].items()} for i in (0, 1))
    at_once, again = frames, 1.0
    if settings.get("chunk") and (name in OF_PAIRS or CATALOGUE[name].input.startswith("image")):
        at_once, again = min(frames, settings["chunk"] + (name in OF_PAIRS)), 4 / 3
    seconds, peak_gib = again * _interpolate(seconds, frames), _interpolate(peak_gib, at_once)
    return RewardCost(int(row["weights_gib"] * GIB), int(peak_gib * GIB), seconds)


def _interpolate(measured: dict[int, float], frames: int) -> float:
    """Return the cost of `frames` on the line through the costs that were measured."""
    low, high = min(measured), max(measured)
    if low == high:
        return measured[high] * max(1.0, frames / high)
    slope = max(0.0, (measured[high] - measured[low]) / (high - low))
    return measured[low] + slope * (frames - low)
