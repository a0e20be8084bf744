"""Rewards without weights: values by hand, ranges, gradients, and what they are blind to."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from rewards import RewardError, load_reward, probe

NAMES = ["flicker", "smoothness", "frame_difference", "jpeg_size"]
PROMPTS = ["a", "b"]


def steps(*levels):
    """Two uniform videos with one grey level a frame; the second is half as bright."""
    video = torch.tensor(levels).reshape(1, 1, -1, 1, 1).expand(2, 3, -1, 16, 16)
    return video * torch.tensor([1.0, 0.5]).reshape(2, 1, 1, 1, 1)


def score(name, video):
    return load_reward(name)(video, PROMPTS).tolist()


def test_values_by_hand():
    video = steps(0.0, 0.4, 0.2)  # differences .4, .2; second difference -.6
    assert score("frame_difference", video) == pytest.approx([0.3, 0.15])
    assert score("flicker", video) == pytest.approx([0.7, 0.85])
    assert score("smoothness", video) == pytest.approx([0.7, 0.85])


def test_the_ends_of_the_ranges():
    still, worst = steps(0.3, 0.3, 0.3), steps(0.0, 1.0, 0.0)
    assert score("flicker", still) == score("smoothness", still) == [1.0, 1.0]
    assert score("frame_difference", still) == [0.0, 0.0]
    assert score("flicker", worst)[0] == score("smoothness", worst)[0] == 0.0
    assert score("frame_difference", worst)[0] == 1.0


def test_smoothness_leaves_a_steady_fade_alone_and_flicker_does_not():
    fade = steps(0.1, 0.2, 0.3, 0.4)
    assert score("smoothness", fade) == pytest.approx([1.0, 1.0], abs=1e-6)
    assert score("flicker", fade) == pytest.approx([0.9, 0.95])


def test_smoothness_knows_the_times_of_the_frames():
    """A fade whose frames last unequally is steady; by their order it is not."""
    times = [0.0, 1.0, 1.5, 3.5]
    fade, reward = steps(*(0.2 * time for time in times)), load_reward("smoothness")
    assert reward(fade, PROMPTS, times=times).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    assert score("smoothness", fade)[0] == pytest.approx(1 - (0.1 + 0.3) / 4)
    picked = load_reward("smoothness", num_frames="1 fps")  # 0, 1.5, 2 and 3.5 seconds of these
    times = [0.0, 0.1, 1.5, 2.0, 3.5]
    uneven = steps(0.0, 0.9, 0.3, 0.4, 0.7)
    assert picked(uneven, PROMPTS, times=times, fps=5 / 3.6)[0].item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_probe_passes(name):
    report = probe(load_reward(name), (3, 6, 20, 27))
    assert report.frames == 6
    assert min(report.grad_norms) > 0


@pytest.mark.parametrize("name", NAMES)
def test_gradient_equals_finite_difference(name):
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, 3, 4, 9, 11, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: load_reward(name)(x, ["a"]), video, fast_mode=True)


@pytest.mark.parametrize(("name", "frames"), [("flicker", 1), ("frame_difference", 1), ("smoothness", 2)])
def test_too_few_frames_are_named(name, frames):
    with pytest.raises(RewardError, match=rf"{name}.*got {frames} frame\(s\); expected at least {frames + 1}"):
        load_reward(name)(torch.rand(1, 3, frames, 8, 8), ["a"])


def test_arguments_of_the_contract():
    reward = load_reward("flicker", frames=5, mean=0.9, std=0.05)
    assert (reward.frames, reward.mean, reward.std) == (5, 0.9, 0.05)
    assert reward(steps(0.1, 0.2).bfloat16(), PROMPTS).dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_frames_are_chosen_as_elsewhere(name):
    video = torch.rand(2, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0))
    chosen = load_reward(name)(video[:, :, [0, 2, 4, 6, 8]], PROMPTS)
    torch.testing.assert_close(load_reward(name, num_frames=5)(video, PROMPTS), chosen)
    torch.testing.assert_close(load_reward(name, num_frames="4 fps")(video, PROMPTS, fps=8), chosen)
    with pytest.raises(RewardError, match="got num_frames=5; expected num_frames between 1 and the 4"):
        load_reward(name, frames=4, num_frames=5)


def pictures():
    """From plain to noisy, as (3, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, 64, 64, generator=generator)
    smooth = [
        F.interpolate(noise[..., :n, :n], size=(64, 64), mode="bicubic").clamp(0, 1)[0] for n in (2, 4, 8, 16, 32)
    ]
    return [torch.full((3, 64, 64), 0.3), *smooth, 0.5 * smooth[2] + 0.25, noise[0]]


def jpeg_bytes(picture):
    file = io.BytesIO()
    pixels = (picture * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    Image.fromarray(pixels).convert("L").save(file, "JPEG", quality=50, optimize=True)
    return file.tell()


def test_jpeg_size_follows_the_size_of_real_files():
    reward = load_reward("jpeg_size")
    proxy = np.array([-reward(picture[None, :, None], ["a"]).item() for picture in pictures()])
    real = np.array([jpeg_bytes(picture) for picture in pictures()])
    assert (np.argsort(proxy) == np.argsort(real)).all()
    assert np.corrcoef(proxy, real)[0, 1] > 0.98


def test_jpeg_size_of_one_plain_colour_is_zero_whatever_the_size():
    for height, width in [(16, 16), (17, 23)]:
        video = torch.full((2, 3, 1, height, width), 0.2)
        assert score("jpeg_size", video) == pytest.approx([0.0, 0.0], abs=1e-5)
    video = torch.rand(2, 3, 1, 16, 23, generator=torch.Generator().manual_seed(0))
    assert score("jpeg_size", video) == score("jpeg_size", torch.cat([video, video[..., -1:]], -1))


@pytest.mark.parametrize(("channel", "share"), [(0, 0.299), (1, 0.587), (2, 0.114)])
def test_jpeg_coefficients_are_those_of_the_cosine_transform(channel, share):
    """One basis function of amplitude A in every block gives one coefficient of known size."""
    place, amplitude = torch.arange(16.0), 0.25
    wave = torch.cos(torch.pi / 8 * (place % 8 + 0.5) * 3)  # frequency 3 along the width, 0 along the height
    video = torch.full((1, 3, 1, 16, 16), 0.5)
    video[:, channel] += amplitude * wave
    coefficient = 255 * share * amplitude * (8**0.5) * 2 / 16  # norm of the block / quantisation step of (0, 3)
    assert load_reward("jpeg_size")(video, ["a"]).item() == pytest.approx(-np.log1p(coefficient) / 63, rel=1e-4)


def test_jpeg_size_equals_its_definition_written_out():
    """63 coefficients of two blocks by the double sum of ITU-T T.81, A.3.3; Q of table K.1."""
    video = torch.rand(1, 3, 1, 8, 16, generator=torch.Generator().manual_seed(0))
    y = 255 * np.einsum("c,chw->hw", [0.299, 0.587, 0.114], video[0, :, 0].double().numpy())
    table = """
        16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
        18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99
    """
    steps = [int(step) for step in table.split()]
    total = 0.0
    for block in (y[:, :8], y[:, 8:]):
        for v in range(8):
            for u in range(8):
                waves = [np.cos((2 * np.arange(8) + 1) * k * np.pi / 16) for k in (v, u)]
                scale = (2**-0.5 if u == 0 else 1) * (2**-0.5 if v == 0 else 1) / 4
                coefficient = scale * (waves[0] @ block @ waves[1])
                total += 0 if u == v == 0 else np.log1p(abs(coefficient) / steps[8 * v + u])
    assert load_reward("jpeg_size")(video, ["a"]).item() == pytest.approx(-total / 126, abs=1e-5)
