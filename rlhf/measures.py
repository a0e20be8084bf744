"""What can be told of videos without any judge: motion, and the traces that a cheated reward leaves."""

import torch
import torch.nn.functional as F


def motion(video_BCTHW: torch.Tensor) -> torch.Tensor:
    """(B,) mean absolute difference of neighbouring frames; 0 for a single frame."""
    if video_BCTHW.shape[2] == 1:
        return torch.zeros(len(video_BCTHW), device=video_BCTHW.device)
    return video_BCTHW.diff(dim=2).abs().mean((1, 2, 3, 4))


def saturation(video_BCTHW: torch.Tensor) -> torch.Tensor:
    """(B,) share of the colour values that are as dark or as bright as eight bits can be."""
    half = 0.5 / 255
    return ((video_BCTHW < half) | (video_BCTHW >= 1 - half)).float().mean((1, 2, 3, 4))


def high_frequency(video_BCTHW: torch.Tensor) -> torch.Tensor:
    """(B,) root mean square of what a mean over 3x3 pixels takes away: edges, and grids, dots and noise."""
    frames = video_BCTHW.transpose(1, 2).flatten(0, 1)
    smooth = F.avg_pool2d(frames, 3, stride=1, padding=1, count_include_pad=False)
    return (frames - smooth).square().unflatten(0, (len(video_BCTHW), -1)).mean((1, 2, 3, 4)).sqrt()


def distance(a_BCTHW: torch.Tensor, b_BCTHW: torch.Tensor) -> torch.Tensor:
    """(B,) mean absolute difference of two videos."""
    return (a_BCTHW - b_BCTHW).abs().mean((1, 2, 3, 4))


DIVERSITY = "diversity"  # needs two videos of a prompt
OF_ONE_VIDEO = {"motion": motion, "saturation": saturation, "high_frequency": high_frequency}
MEASURES = (*OF_ONE_VIDEO, DIVERSITY)
