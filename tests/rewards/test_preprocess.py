"""Preprocessing against PIL, and its gradient against float64 finite differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import DATA, by_pil, noise, photograph, to_float
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from rewards.common.preprocess import CLIP_MEAN, CLIP_STD, preprocess, resize

NONE = (0, 0, 0), (1, 1, 1)  # no normalisation


def test_two_calls_equal_one():
    image = noise(97, 64)
    target = Resize(40)(image).size
    assert torch.equal(by_pil(image, 40, "shortest"), to_float(CenterCrop(40)(image.resize(target, Image.BICUBIC))))


def by_vbench(image, size):
    """VBench's dino_transform_Image: bilinear, nothing cropped."""
    return to_float(Resize(size, InterpolationMode.BILINEAR)(image))


@pytest.mark.parametrize("fit", ["shortest", "squash", "whole"])
@pytest.mark.parametrize(
    ("width", "height", "size"), [(832, 480, 224), (300, 451, 224), (64, 64, 224), (97, 64, 224), (60, 101, 32)]
)
@pytest.mark.parametrize("picture", [photograph, noise])
def test_it_matches_pil(picture, width, height, size, fit):
    image = picture(width, height)
    whole = fit == "whole"
    ours = preprocess(to_float(image), size, *NONE, fit, "bilinear" if whole else "bicubic")
    theirs = by_vbench(image, size) if whole else by_pil(image, size, fit)
    assert ours.shape == theirs.shape
    assert whole or ours.shape == (1, 3, size, size)
    difference = (ours - theirs).abs() * 255
    assert difference.mean() < 0.4
    assert difference.max() < 2


@pytest.mark.parametrize(("width", "height"), [(832, 480), (480, 848), (704, 1280), (60, 101), (32, 32)])
def test_mp4_fits_match_vbench_on_float_tensors(width, height):
    """Its dino_transform and clip_transform: no antialias, and the overshoot of bicubic stays."""
    pixels = to_float(noise(width, height))
    bilinear = Resize(32, InterpolationMode.BILINEAR, antialias=False)(pixels * 255) / 255
    bicubic = CenterCrop(32)(Resize(32, InterpolationMode.BICUBIC, antialias=False)(pixels * 255)) / 255
    torch.testing.assert_close(preprocess(pixels, 32, *NONE, "mp4_whole", "bilinear"), bilinear, atol=1e-4, rtol=0)
    torch.testing.assert_close(preprocess(pixels, 32, *NONE, "mp4_shortest"), bicubic, atol=1e-4, rtol=0)
    assert (width, height) == (32, 32) or bicubic.max() > 1.01


def test_simpler_resizes_do_not_match_pil():
    """The bounds above can fail: for plain bicubic, and for a clamp at the end only."""
    image, size = noise(97, 64), (224, 224)
    target = by_pil(image, 224, "squash")
    plain = F.interpolate(to_float(noise(832, 480)), size=size, mode="bicubic").clamp(0, 1)
    assert ((plain - by_pil(noise(832, 480), 224, "squash")).abs() * 255).max() > 40
    clamped_once = F.interpolate(to_float(image), size=size, mode="bicubic", antialias=True).clamp(0, 1)
    assert ((clamped_once - target).abs() * 255).max() > 10


def test_the_published_clip_golden_image():
    if not (DATA / "kafka_clip_preprocessed.npy").exists():
        pytest.skip("no golden image in ../shared/data")
    golden = torch.from_numpy(np.load(DATA / "kafka_clip_preprocessed.npy")).reshape(1, 3, 224, 224)
    image = Image.open(DATA / "franz-kafka.jpg").convert("RGB")
    difference = (preprocess(to_float(image), 224) - golden) * torch.tensor(CLIP_STD)[:, None, None] * 255
    assert difference.abs().mean() < 0.5
    assert difference.abs().max() <= 4


def test_it_is_normalised_after_the_clamp():
    black_and_white = torch.stack([torch.zeros(3, 40, 40), torch.ones(3, 40, 40)])
    low, high = preprocess(black_and_white, 16)
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    torch.testing.assert_close(low, (-mean / std).expand_as(low))
    torch.testing.assert_close(high, ((1 - mean) / std).expand_as(high))


def test_bars_are_above_and_below_a_wide_picture_in_equal_parts():
    padded = preprocess(torch.ones(1, 3, 64, 97), 224, *NONE, "pad")[0, 0]
    assert padded[:, 112].nonzero().flatten().tolist() == list(range(38, 186))  # 147.8 rows, rounded


def test_overshoot_is_clamped():
    edge = torch.zeros(1, 3, 64, 64)
    edge[..., 32:] = 1
    assert F.interpolate(edge, size=(20, 20), mode="bicubic", antialias=True).max() > 1.01
    pixels = resize(edge, 20, 20)
    assert pixels.min() == 0
    assert pixels.max() == 1


def test_the_right_size_passes_through_unchanged():
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(preprocess(x, 32, *NONE), x)


@pytest.mark.parametrize(("dtype", "result"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_dtypes_are_cast_up_and_never_down(dtype, result):
    x = torch.rand(1, 3, 20, 30).to(getattr(torch, dtype))
    assert preprocess(x, 16).dtype == getattr(torch, result)


@pytest.mark.parametrize("fit", ["shortest", "squash"])
@pytest.mark.parametrize("shape", [(9, 14), (5, 4)])
def test_gradient_equals_finite_difference(shape, fit):
    generator = torch.Generator().manual_seed(0)
    x = 0.4 + 0.2 * torch.rand(1, 3, *shape, dtype=torch.float64, generator=generator)  # no overshoot out of range
    assert torch.autograd.gradcheck(lambda x: preprocess(x, 7, fit=fit), x.requires_grad_())
