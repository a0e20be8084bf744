"""Measures against numbers worked out by hand."""

import math

import pytest
import torch

from rlhf.evaluation.measures import distance, high_frequency, motion, saturation


@pytest.fixture
def video():
    """Three frames: black, half grey, black."""
    video = torch.zeros(2, 3, 3, 6, 6)
    video[:, :, 1] = 0.5
    return video


def test_motion_is_the_mean_change_of_a_frame(video):
    assert motion(video).tolist() == [0.5, 0.5]
    assert motion(video[:, :, :1]).tolist() == [0, 0]


def test_distance_is_the_mean_difference(video):
    assert distance(video, torch.ones_like(video)).tolist() == pytest.approx([1 - 0.5 / 3] * 2)


def test_saturation_counts_what_eight_bits_cannot_tell_from_black_or_white(video):
    assert saturation(video).tolist() == pytest.approx([2 / 3] * 2)
    video[:] = 0.5
    video[1, 0] = 0.9985
    video[1, 1] = 0.0015
    video[1, 2, 0] = 0.003
    assert saturation(video).tolist() == pytest.approx([0, 2 / 3])


def test_high_frequency_sees_a_grid_and_no_slope():
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    grid, slope = 0.5 + 0.1 * (-1) ** (x + y), 0.2 + 0.01 * x
    frames = torch.stack([grid, slope])[:, None, None].expand(2, 3, 4, 32, 32)
    of_grid, of_slope = high_frequency(frames).tolist()
    # Of a checkerboard of amplitude a, nine pixels leave a mean of a/9; a little more at the rim.
    assert of_grid == pytest.approx(0.1 * 8 / 9, rel=0.05)
    assert of_slope < 0.002 < of_grid / 20
    assert math.isclose(high_frequency(frames[:1]).item(), of_grid, rel_tol=1e-6)
