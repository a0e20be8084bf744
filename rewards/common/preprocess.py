"""Differentiable image preprocessing, equal to the published pipelines up to rounding.

Float pixels (N, C, H, W) in [0, 1] -> bicubic or bilinear antialiased resize, clamped to [0, 1] ->
crop -> normalise; in float32, or in float64 for float64 pixels. PIL rounds to 1/255 after each of
its two passes. Therefore results differ by 0.3/255 on average and by at most about 1/255.
docs/rewards.md says which pipeline each reward equals.

The clamp passes gradients straight through, as that of the decoder does: a black or white region
of a video has a gradient. The gradient of the identity is linear, so that it serves both the
ascent of a score and the descent of a loss.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F

from rewards.contract import at_least_float32
from rlhf.types import clamp_straight_through

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocess(
    frames_NCHW: torch.Tensor,
    size: int,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    fit: str = "shortest",
    mode: str = "bicubic",
) -> torch.Tensor:
    """Resize by `fit` and normalise, to (N, C, size, size); "whole" keeps the aspect ratio.

    fit   "shortest" (resize the shorter side, crop the centre as torchvision, OpenAI and open_clip
          do), "shortest_floor" (the same, cropped as transformers does), "whole" (without the
          crop), "squash" (resize both sides) or "pad" (hpsv2's: resize the longer side without a
          clamp, add black bars); "mp4_whole", "mp4_shortest" and "mp4_shortest_8_bit" are VBench's
          for mp4 files, without antialiasing, of float and of 8-bit tensors
    mode  "bicubic" or "bilinear"
    """
    with torch.autocast(frames_NCHW.device.type, enabled=False):  # bf16 products would cost half a grey level
        pixels_NCHW = _FITS[fit](at_least_float32(frames_NCHW), size, mode)
    mean_C11, std_C11 = (pixels_NCHW.new_tensor(x)[:, None, None] for x in (mean, std))
    return (pixels_NCHW - mean_C11) / std_C11


def resize(
    x_NCHW: torch.Tensor, height: int, width: int, mode: str = "bicubic", clamp: bool = True, antialias: bool = True
) -> torch.Tensor:
    """Resize with antialiasing in two passes, each a matrix product clamped to [0, 1].

    The backward of `F.interpolate(antialias=True)` is missing on some accelerators and not
    deterministic on others. PIL also clips after the first pass (width), which changes up to 20/255
    on noise. clamp=False keeps the overshoot of bicubic, as a float tensor's resize does.
    antialias=False takes the nearest pixels alone and clamps at the end, as for an 8-bit tensor.
    """
    limit = partial(clamp_straight_through, low=0.0, high=1.0) if clamp else lambda x: x
    W_w = _resize_matrix(x_NCHW.shape[-1], width, mode, antialias, x_NCHW.dtype, x_NCHW.device)
    W_h = _resize_matrix(x_NCHW.shape[-2], height, mode, antialias, x_NCHW.dtype, x_NCHW.device)
    x_NCHW = x_NCHW @ W_w.T
    return limit(W_h @ (limit(x_NCHW) if antialias else x_NCHW))


def resize_shorter(x_NCHW: torch.Tensor, size: int, mode: str = "bicubic", **options) -> torch.Tensor:
    """Resize the shorter side to `size`, the longer to int(size * long / short).

    options are those of `resize`.
    """
    height, width = x_NCHW.shape[-2:]
    short, long = min(height, width), max(height, width)
    resized_long = int(size * long / short)
    new_height, new_width = (size, resized_long) if height <= width else (resized_long, size)
    return resize(x_NCHW, new_height, new_width, mode, **options)


def resize_shorter_and_crop(
    x_NCHW: torch.Tensor, size: int, mode: str = "bicubic", offset: Callable[[float], int] = round, **options
) -> torch.Tensor:
    """Resize the shorter side to `size` and crop the centre; offset rounds half of what is left.

    torchvision's CenterCrop rounds, transformers' image processors round down. options are those of
    `resize`.
    """
    x_NCHW = resize_shorter(x_NCHW, size, mode, **options)
    top, left = (offset((side - size) / 2) for side in x_NCHW.shape[-2:])
    return x_NCHW[..., top : top + size, left : left + size]


def resize_longer_and_pad(x_NCHW: torch.Tensor, size: int, mode: str = "bicubic") -> torch.Tensor:
    """Resize the longer side to `size`, overshoot kept, and pad to a centred black square."""
    height, width = x_NCHW.shape[-2:]
    scale = size / max(height, width)
    new_height, new_width = round(height * scale), round(width * scale)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    bars = (left, size - new_width - left, top, size - new_height - top)
    return F.pad(resize(x_NCHW, new_height, new_width, mode, clamp=False), bars)


_FITS = {
    "shortest": resize_shorter_and_crop,
    "shortest_floor": partial(resize_shorter_and_crop, offset=math.floor),
    "whole": resize_shorter,
    "squash": lambda x_NCHW, size, mode: resize(x_NCHW, size, size, mode),
    "pad": resize_longer_and_pad,
    "mp4_whole": partial(resize_shorter, clamp=False, antialias=False),
    "mp4_shortest": partial(resize_shorter_and_crop, clamp=False, antialias=False),
    "mp4_shortest_8_bit": partial(resize_shorter_and_crop, antialias=False),
}


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a matrix made during evaluation serves training too
def _resize_matrix(
    before: int, after: int, mode: str, antialias: bool, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return the resize matrix (after, before), computed in float64 on the CPU."""
    identity = torch.eye(before, dtype=torch.float64)[None, None]
    return F.interpolate(identity, size=(after, before), mode=mode, antialias=antialias)[0, 0].to(dtype).to(device)
