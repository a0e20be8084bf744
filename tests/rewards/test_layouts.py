"""State dicts at full size, on the meta device, against the published layouts; published texts.

Each list there says how it was obtained, and what the published file weighs.
"""

import hashlib
import json
import math

import pytest
import torch
from layouts import FOLDER, layout_of, published_layout
from transformers import Idefics2Config, Qwen2VLConfig, Qwen2VLModel

from rewards.common.clip_models import CLIP_H14, CLIP_L14, random_clip, random_siglip
from rewards.common.heads import LinearLayers
from rewards.common.qwen_vl import merge_lora, split_backbone_and_head
from rewards.common.weights import build_from_state_dict, rename_keys, shapes
from rewards.models import hps, hps_v3, image_reward, mps, viclip, video_align, video_score, vjepa2

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
    renamed = rename_keys(published, image_reward.RENAMED, image_reward.UNUSED)
    assert ours(image_reward.ImageRewardModel) == renamed
    unused = {key for key in published if any(part in key for part in image_reward.UNUSED)}
    assert len(unused) == 5
    assert len(renamed) == len(published) - len(unused)  # no two keys became one


@pytest.mark.parametrize("prefix", ["", "mps."], ids=["MPS_overall.pth", "mpsv1"])
def test_mps_under_its_new_names(prefix):
    published = {prefix + key: shape for key, shape in published_layout("mps").items()}
    renamed = rename_keys(published, mps.RENAMED, mps.UNUSED)
    assert ours(mps.MpsModel) == renamed
    assert len(renamed) == len(published) - 4  # four layers of rotary frequencies


def test_the_cross_model_of_mps_has_about_118_million_parameters():
    size = sum(math.prod(shape) for key, shape in published_layout("mps").items() if key.startswith("cross_model."))
    assert size == pytest.approx(118.5e6, rel=0.005)


def test_the_image_half_of_siglip():
    published = published_layout("siglip_so400m")
    wanted = {key.removeprefix("vision_model."): shape for key, shape in published.items() if "vision_model" in key}
    assert ours(lambda: random_siglip().model) == wanted


# ---------------------------------------- video and vision-language models


@pytest.fixture
def meta():
    with torch.device("meta"):
        yield


def published_state(name):
    return {key: torch.empty(shape, dtype=torch.bfloat16) for key, shape in published_layout(name).items()}


@pytest.mark.parametrize(
    ("module", "build", "layout", "size"),
    [
        (video_align, video_align.VideoAlign, "kwaivgi_videoreward", 5.03),
        (hps_v3, hps_v3.HpsV3, "mizzenai_hpsv3", 16.56),
    ],
)
def test_qwen_vl_rewards_load_the_published_layout(module, build, layout, size, meta):
    """Through the merge of the adapter, if any, and the renaming, to the full-size model."""
    published = published_state(layout)
    assert sum(tensor.numel() for tensor in published.values()) * 2 / 1e9 == pytest.approx(size, abs=0.05)
    merged = merge_lora(published, 128, torch.bfloat16)
    assert len(published) - len(merged) == (28 * 7 * 2 if module is video_align else 0)
    backbone, head = split_backbone_and_head(merged, torch.bfloat16)
    reward = build.random_init()
    assert shapes(backbone) == layout_of(reward.vlm.model)
    assert shapes(head) == layout_of(reward.vlm.head)
    make = lambda: Qwen2VLModel(Qwen2VLConfig(**module.SIZES))
    build_from_state_dict(build.name, "published", make, backbone)


def test_video_score_has_the_published_layout(meta):
    model = video_score.model_class()(Idefics2Config(**video_score.SIZES))
    assert layout_of(model) == published_layout("tiger_lab_videoscore")


def test_viclip_has_the_published_layout(meta):
    published = published_state("opengvlab_viclip")
    assert published.pop("temp").shape == ()
    assert viclip.infer_sizes("viclip", published) == viclip.SIZES
    assert layout_of(viclip.ViClip.random_init().model) == shapes(published)


def test_vjepa2_has_the_published_layout(meta):
    assert layout_of(vjepa2.VJepa2.random_init().model) == published_layout("facebook_vjepa2_vitl")


@pytest.mark.parametrize(
    ("module", "digest"),
    [
        (hps_v3, "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"),
        (video_align, "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"),
        (video_score, "49b386d9ea3003760c983cc258cf4211faf858d58191f95fcfacdf68a8fed2c0"),
    ],
)
def test_the_prompts_are_the_published_ones(module, digest):
    assert hashlib.sha256(module.PROMPT.encode()).hexdigest() == digest
