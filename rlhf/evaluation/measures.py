"""Measures of videos without a judge: motion, diversity, and traces of a cheated reward."""

import torch
import torch.nn.functional as F


def motion(video_BCTHW: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute difference of neighbouring frames, (B,); 0 for a single frame."""
    if video_BCTHW.shape[2] == 1:
        return torch.zeros(len(video_BCTHW), device=video_BCTHW.device)
    return video_BCTHW.diff(dim=2).abs().mean((1, 2, 3, 4))


def saturation(video_BCTHW: torch.Tensor) -> torch.Tensor:
    """Return the share of colour values that are 0 or 255 in eight bits, (B,)."""
    half = 0.5 / 255
    return ((video_BCTHW < half) | (video_BCTHW >= 1 - half)).float().mean((1, 2, 3, 4))


def high_frequency(video_BCTHW: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of frames less their 3x3 means, (B,): edges, grids, noise."""
    frames = video_BCTHW.transpose(1, 2).flatten(0, 1)
    smooth = F.avg_pool2d(frames, 3, stride=1, padding=1, count_include_pad=False)
    return (frames - smooth).square().unflatten(0, (len(video_BCTHW), -1)).mean((1, 2, 3, 4)).sqrt()


def distance(a_BCTHW: torch.Tensor, b_BCTHW: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute difference of two videos, (B,)."""
    return (a_BCTHW - b_BCTHW).abs().mean((1, 2, 3, 4))


DIVERSITY = "diversity"  # the distance of two videos of one prompt
SINGLE_VIDEO_MEASURES = {"motion": motion, "saturation": saturation, "high_frequency": high_frequency}
MEASURES = (*SINGLE_VIDEO_MEASURES, DIVERSITY)
