"""Rewards without weights, computed from pixels.

All but `frame_difference` are highest for a still video, and `jpeg_size` for an empty one. Combine
them with a reward for motion or content.

Shape legend: B batch, C channels, T frames, H height, W width.
"""

import math

import torch
import torch.nn.functional as F

from rewards.common.frames import check_num_frames, choose_frames, pick_frames, require_frames
from rewards.contract import at_least_float32


class PixelReward:
    """Base class of rewards without weights.

    frames      frames to decode: "all", "first" or a number of leading frames
    num_frames  decoded frames to score, as for ModelReward
    mean, std   typical score and its standard deviation, for mixing
    """

    name: str

    def __init__(
        self,
        frames: str | int = "all",
        num_frames: int | str | None = None,
        mean: float | None = None,
        std: float | None = None,
    ):
        check_num_frames(self.name, frames, num_frames)
        self.frames, self.num_frames, self.mean, self.std = frames, num_frames, mean, std

    def __call__(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        """Return scores (B,)."""
        total = video_BCTHW.shape[2]
        times = info.get("times") or range(total)
        times = [times[i] for i in choose_frames(self.name, self.num_frames, total, info)]
        return self.score(at_least_float32(pick_frames(self, video_BCTHW, info)), times)

    def score(self, video_BCTHW: torch.Tensor, times: list[float]) -> torch.Tensor:
        """Return scores (B,) of the selected frames; times ascend, in any unit."""
        raise NotImplementedError

    def mean_difference(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """Return the mean absolute difference (B,) of adjacent frames, in [0, 1]."""
        require_frames(self.name, video_BCTHW.shape[2], 2)
        return video_BCTHW.diff(dim=2).abs().mean(dim=(1, 2, 3, 4))


class FrameDifference(PixelReward):
    """Motion: mean |x[t+1] - x[t]|, in [0, 1]; 0 for a still video. Noise counts too."""

    name = "frame_difference"

    def score(self, video_BCTHW: torch.Tensor, times: list[float]) -> torch.Tensor:
        """Return the mean of |x[t+1] - x[t]|, (B,)."""
        return self.mean_difference(video_BCTHW)


class Flicker(PixelReward):
    """VBench's temporal flickering: 1 - mean |x[t+1] - x[t]|, in [0, 1]; 1 for a still video."""

    name = "flicker"

    def score(self, video_BCTHW: torch.Tensor, times: list[float]) -> torch.Tensor:
        """Return 1 - the mean of |x[t+1] - x[t]|, (B,)."""
        return 1 - self.mean_difference(video_BCTHW)


class Smoothness(PixelReward):
    """Smoothness: 1 - mean |x[t+2] - 2 x[t+1] + x[t]| / 2, in [0, 1]; 1 for a steady fade.

    Where frames are not evenly spaced, each is compared with the line between its neighbours at its
    own time.
    """

    name = "smoothness"

    def score(self, video_BCTHW: torch.Tensor, times: list[float]) -> torch.Tensor:
        """Return 1 - the mean of |x[t+1] - (x[t] and x[t+2], interpolated)|, (B,)."""
        require_frames(self.name, video_BCTHW.shape[2], 3)
        gaps = torch.tensor(times, dtype=torch.float64).diff()
        later_T11 = (gaps[:-1] / (gaps[:-1] + gaps[1:])).to(video_BCTHW)[:, None, None]
        line_BCTHW = torch.lerp(video_BCTHW[:, :, :-2], video_BCTHW[:, :, 2:], later_T11)
        return 1 - (video_BCTHW[:, :, 1:-1] - line_BCTHW).abs().mean(dim=(1, 2, 3, 4))


class JpegSize(PixelReward):
    """Compressibility: -mean log(1 + |DCT / Q|) of 8x8 luma blocks, in [-5, 0]; 0 if plain.

    A proxy for the negative file size as JPEG of quality 50. Q is the luma table of the standard
    (ITU-T T.81, K.1). The mean over coefficients makes image sizes comparable. The DC coefficient
    is left out, since it would favour grey; JPEG encodes only its change between blocks.
    """

    name = "jpeg_size"

    def score(self, video_BCTHW: torch.Tensor, times: list[float]) -> torch.Tensor:
        """Return minus the mean of log(1 + |DCT / Q|), (B,)."""
        red, green, blue = video_BCTHW.unbind(1)
        luma_BTHW = 255 * (0.299 * red + 0.587 * green + 0.114 * blue)  # JPEG's Y
        height, width = luma_BTHW.shape[-2:]
        luma_BTHW = F.pad(luma_BTHW, (0, -width % 8, 0, -height % 8), mode="replicate")
        blocks = luma_BTHW.unfold(2, 8, 8).unfold(3, 8, 8)  # (B, T, rows, columns, 8, 8)
        dct, table = _dct_matrix().to(blocks), torch.tensor(_QUANTISATION).to(blocks)
        coefficients = (dct @ blocks @ dct.T / table).flatten(-2)[..., 1:]
        return -coefficients.abs().log1p().flatten(1).mean(1)


def _dct_matrix() -> torch.Tensor:
    """Return the orthonormal DCT-II matrix (8, 8)."""
    frequency, position = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    matrix = torch.cos(math.pi / 8 * (position + 0.5) * frequency) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


_QUANTISATION = [
    [16.0, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
]
