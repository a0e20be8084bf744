"""What a video file holds."""

from pathlib import Path

import torch

from rewards.cli.files import read_video


def stored_frames(path: Path) -> torch.Tensor:
    """(T, H, W, 3) float, 0 to 255."""
    return read_video(path).pixels_BCTHW[0].permute(1, 2, 3, 0) * 255


def stored_rate(path: Path) -> float:
    return read_video(path).info["fps"]
