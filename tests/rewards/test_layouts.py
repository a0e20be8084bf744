"""State dicts of image rewards at full size, on the meta device, against the published layouts in data/layouts.

Each list there says how it was obtained, and what the published file weighs.
"""

import json
import math

import pytest
import torch
from layouts import FOLDER, layout_of, published_layout

from rewards.common.clip_models import CLIP_H14, CLIP_L14, random_clip, random_siglip
from rewards.common.heads import LinearLayers
from rewards.models import hps, image_reward, mps

IMAGE_MODELS = [
    "aesthetic_v1",
    "aesthetic_v2",
    "aesthetic_v2_5",
    "clip_vit_l_14",
    "hps",
    "image_reward",
    "mps",
    "pickscore",
    "siglip_so400m",
]


def ours(build):
    with torch.device("meta"):
        return layout_of(build())


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_the_list_weighs_what_the_published_file_weighs(name):
    published = json.loads((FOLDER / f"{name}.json").read_text())
    size = sum(math.prod(shape) for shape in published_layout(name).values()) * published["bytes_per_value"]
    slack = 5e3 + 0.003 * size  # names and padding in the file; sizes are published to three digits
    assert abs(size - published["gigabytes"] * 1e9) < slack


@pytest.mark.parametrize(
    ("name", "prefix", "build"),
    [
        ("aesthetic_v1", "", lambda: torch.nn.Linear(768, 1)),
        ("aesthetic_v2", "layers.", lambda: LinearLayers(768)),
        ("aesthetic_v2_5", "scoring_head.", lambda: LinearLayers(1152, dropout_before_last=True)),
    ],
)
def test_heads(name, prefix, build):
    assert {prefix + key: shape for key, shape in ours(build).items()} == published_layout(name)


def test_hps_has_the_686_keys():
    assert ours(hps.random_open_clip) == published_layout("hps")
    assert len(published_layout("hps")) == 686


@pytest.mark.parametrize(("name", "model"), [("pickscore", CLIP_H14), ("clip_vit_l_14", CLIP_L14)])
def test_clips_of_transformers(name, model):
    """transformers drops the positions that older versions wrote; all else must agree."""
    wanted = {key: shape for key, shape in published_layout(name).items() if not key.endswith("position_ids")}
    assert ours(lambda: random_clip(model).model) == wanted
    assert len(wanted) == len(published_layout(name)) - 2


def test_image_reward_under_its_new_names():
    published = published_layout("image_reward")
    assert ours(image_reward.ImageRewardModel) == image_reward.rename_published_keys(published)
    unused = {key for key in published if any(part in key for part in image_reward.UNUSED)}
    assert len(unused) == 5
    assert len(image_reward.rename_published_keys(published)) == len(published) - len(unused)  # no two keys became one


@pytest.mark.parametrize("prefix", ["", "mps."], ids=["MPS_overall.pth", "mpsv1"])
def test_mps_under_its_new_names(prefix):
    published = {prefix + key: shape for key, shape in published_layout("mps").items()}
    assert ours(mps.MpsModel) == mps.rename_published_keys(published)
    assert len(mps.rename_published_keys(published)) == len(published) - 4  # four layers of rotary frequencies


def test_the_cross_model_of_mps_has_about_118_million_parameters():
    size = sum(math.prod(shape) for key, shape in published_layout("mps").items() if key.startswith("cross_model."))
    assert size == pytest.approx(118.5e6, rel=0.005)


def test_the_image_half_of_siglip():
    published = published_layout("siglip_so400m")
    wanted = {key.removeprefix("vision_model."): shape for key, shape in published.items() if "vision_model" in key}
    assert ours(lambda: random_siglip().model) == wanted
