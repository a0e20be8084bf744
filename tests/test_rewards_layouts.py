"""State dicts at full size, on the meta device, against the published layouts in data/layouts.

Each file there lists keys and shapes of one published file and says how the list was obtained; `{0..31}` stands for
that run of numbers.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, SiglipVisionConfig, SiglipVisionModel

from rewards import hps, image_reward, mps
from rewards.heads import LinearLayers

LAYOUTS = Path(__file__).parent / "data" / "layouts"
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


def layout(name):
    """{key: shape} of a published file."""
    shapes = {}
    for key, shape in json.loads((LAYOUTS / f"{name}.json").read_text())["keys"].items():
        run = re.search(r"\{(\d+)\.\.(\d+)\}", key)
        for number in range(int(run[1]), int(run[2]) + 1) if run else [None]:
            shapes[key if run is None else key.replace(run[0], str(number))] = tuple(shape)
    return shapes


def ours(build):
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in build().state_dict().items()}


def clip(vision, text, width):
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=width))


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_the_list_weighs_what_the_published_file_weighs(name):
    published = json.loads((LAYOUTS / f"{name}.json").read_text())
    size = sum(math.prod(shape) for shape in layout(name).values()) * published["bytes_per_value"]
    slack = 5e3 + 0.003 * size  # names and padding in the file; sizes are published to three digits
    assert abs(size - published["gigabytes"] * 1e9) < slack
    assert published["source"]


@pytest.mark.parametrize(
    ("name", "prefix", "build"),
    [
        ("aesthetic_v1", "", lambda: torch.nn.Linear(768, 1)),
        ("aesthetic_v2", "layers.", lambda: LinearLayers(768)),
        ("aesthetic_v2_5", "scoring_head.", lambda: LinearLayers(1152, dropout_before_last=True)),
    ],
)
def test_heads(name, prefix, build):
    assert {prefix + key: shape for key, shape in ours(build).items()} == layout(name)


def test_hps_has_the_686_keys():
    assert ours(hps.untrained) == layout("hps")
    assert len(layout("hps")) == 686


def test_pickscore_and_the_clip_of_the_aesthetic_predictors():
    """transformers drops the positions that older versions wrote; all else must agree."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    for name, build in [
        ("pickscore", lambda: clip(mps.VISION, mps.TEXT, 1024)),
        ("clip_vit_l_14", lambda: clip(vision | {"patch_size": 14}, text, 768)),
    ]:
        assert ours(build) == {k: v for k, v in layout(name).items() if not k.endswith("position_ids")}


def test_image_reward_under_its_new_names():
    published = layout("image_reward")
    assert ours(image_reward.ImageRewardModel) == image_reward.published_to_ours(published)
    unused = {key for key in published if any(part in key for part in image_reward.UNUSED)}
    assert len(unused) == 5
    assert len(image_reward.published_to_ours(published)) == len(published) - len(unused)  # no two keys became one


@pytest.mark.parametrize("prefix", ["", "mps."], ids=["MPS_overall.pth", "mpsv1"])
def test_mps_under_its_new_names(prefix):
    published = {prefix + key: shape for key, shape in layout("mps").items()}
    assert ours(mps.MpsModel) == mps.published_to_ours(published)
    assert len(mps.published_to_ours(published)) == len(published) - 4  # four layers of rotary frequencies


def test_the_cross_model_of_mps_has_about_118_million_parameters():
    size = sum(math.prod(shape) for key, shape in layout("mps").items() if key.startswith("cross_model."))
    assert size == pytest.approx(118.5e6, rel=0.005)


def test_the_image_half_of_siglip():
    config = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    wanted = {k.removeprefix("vision_model."): v for k, v in layout("siglip_so400m").items() if "vision_model" in k}
    assert ours(lambda: SiglipVisionModel(SiglipVisionConfig(**config, patch_size=14, image_size=384))) == wanted
