"""Memory and time of the built-in rewards, interpolated between measurements."""

import math
import re
from dataclasses import dataclass

from rewards.catalogue import CATALOGUE

GIB = 2**30


@dataclass(frozen=True)
class RewardCost:
    """The cost of scoring a batch, forward and backward."""

    weight_bytes: int
    peak_bytes: int  # above the weights
    seconds: float  # on `DEVICE`


def decoded_frames(name: str, settings: dict, total: int) -> int:
    """Return how many leading frames, of `total`, a built-in reward needs decoded."""
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
    measured.

    Costs are linear in the frames, through the measurements of 1 and 8 frames. Where 1 frame was
    not measured, they are proportional to the frames from 8 frames on, and constant below.
    """
    default = "bfloat16" if CATALOGUE[name].bytes_each == 2 else "float32"
    if (row := COSTS.get((name, settings.get("dtype", default)))) is None:
        return None
    weights_gib, measured = row
    seconds, peak_gib = (_interpolate({n: pair[i] for n, pair in measured.items()}, frames) for i in (0, 1))
    return RewardCost(int(weights_gib * GIB), int(peak_gib * GIB), seconds)


def _interpolate(measured: dict[int, float], frames: int) -> float:
    low, high = min(measured), max(measured)
    if low == high:
        return measured[high] * max(1.0, frames / high)
    slope = max(0.0, (measured[high] - measured[low]) / (high - low))
    return measured[low] + slope * (frames - low)


# Written by `python bench/reward_costs.py --package` from bench/results/rewards.json.
DEVICE = "NVIDIA H200"

# One video of 432x768: (reward, format) ->
# (GiB of weights, {frames: (seconds, peak GiB above the weights)}).
COSTS = {
    ("aesthetic", "bfloat16"): (0.8, {1: (0.0271, 0.272), 8: (0.0282, 1.578)}),
    ("aesthetic", "float32"): (1.596, {1: (0.0238, 0.453), 8: (0.0765, 2.915)}),
    ("aesthetic_v1", "bfloat16"): (0.797, {1: (0.0204, 0.273), 8: (0.0248, 1.581)}),
    ("aesthetic_v1", "float32"): (1.593, {1: (0.0242, 0.453), 8: (0.0764, 2.916)}),
    ("aesthetic_v2_5", "bfloat16"): (0.803, {1: (0.0391, 0.56), 8: (0.0457, 3.632)}),
    ("aesthetic_v2_5", "float32"): (1.6, {1: (0.0568, 0.942), 8: (0.3315, 7.017)}),
    ("background_consistency", "bfloat16"): (0.282, {8: (0.0119, 0.317)}),
    ("background_consistency", "float32"): (0.564, {8: (0.0165, 0.434)}),
    ("clip_score", "bfloat16"): (0.796, {1: (0.0235, 0.273), 8: (0.0308, 1.581)}),
    ("clip_score", "float32"): (1.593, {1: (0.0212, 0.453), 8: (0.0765, 2.916)}),
    ("flicker", "float32"): (0.0, {8: (0.0006, 0.171)}),
    ("frame_difference", "float32"): (0.0, {8: (0.0005, 0.171)}),
    ("hps_v2", "bfloat16"): (1.837, {1: (0.0388, 0.326), 8: (0.0483, 1.887)}),
    ("hps_v2", "float32"): (3.674, {1: (0.0371, 0.557), 8: (0.2839, 3.484)}),
    ("hps_v2_1", "bfloat16"): (1.837, {1: (0.0418, 0.326), 8: (0.0456, 1.887)}),
    ("hps_v2_1", "float32"): (3.674, {1: (0.0349, 0.557), 8: (0.2833, 3.484)}),
    ("hps_v3", "bfloat16"): (14.44, {1: (0.2143, 0.593), 8: (0.7074, 3.884)}),
    ("image_reward", "bfloat16"): (0.833, {1: (0.0688, 0.248), 8: (0.0837, 1.266)}),
    ("image_reward", "float32"): (1.662, {1: (0.0733, 0.353), 8: (0.1006, 2.246)}),
    ("jpeg_size", "float32"): (0.0, {1: (0.0017, 0.083), 8: (0.0016, 0.23)}),
    ("motion_degree", "float32"): (0.02, {8: (0.0721, 5.995)}),
    ("mps", "bfloat16"): (2.058, {1: (0.0428, 0.373), 8: (0.0421, 2.391)}),
    ("mps", "float32"): (4.115, {1: (0.0432, 0.692), 8: (0.1857, 4.484)}),
    ("pickscore", "bfloat16"): (1.837, {1: (0.0346, 0.309), 8: (0.0426, 1.893)}),
    ("pickscore", "float32"): (3.674, {1: (0.0374, 0.559), 8: (0.1585, 3.497)}),
    ("smoothness", "float32"): (0.0, {8: (0.0008, 0.229)}),
    ("subject_consistency", "bfloat16"): (0.16, {8: (0.0121, 0.721)}),
    ("subject_consistency", "float32"): (0.32, {8: (0.0308, 1.202)}),
    ("viclip", "bfloat16"): (0.796, {1: (0.0547, 0.314), 8: (0.0546, 0.415)}),
    ("viclip", "float32"): (1.593, {1: (0.1512, 0.499), 8: (0.1515, 0.553)}),
    ("video_align", "bfloat16"): (4.114, {8: (0.2452, 0.611)}),
    ("video_score", "bfloat16"): (15.407, {1: (0.2091, 0.524), 8: (0.3059, 3.445)}),
    ("vjepa2", "bfloat16"): (0.607, {8: (0.4209, 0.281)}),
    ("vjepa2", "float32"): (1.214, {8: (0.5018, 0.328)}),
}
