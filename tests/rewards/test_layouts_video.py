"""Full size on the meta device: names and shapes of the video and VLM rewards against the published layouts."""

import pytest
import torch
from layouts import layout_of, published_layout
from transformers import Idefics2Config, Qwen2VLConfig, Qwen2VLModel

from rewards.common.qwen_vl import merge_lora, split_backbone_and_head
from rewards.common.weights import build_from_state_dict, shapes
from rewards.models import hps_v3, viclip, video_align, video_score, vjepa2


@pytest.fixture(autouse=True)
def _meta():
    with torch.device("meta"):
        yield


def published_state(name):
    return {key: torch.empty(shape, dtype=torch.bfloat16) for key, shape in published_layout(name).items()}


def test_video_align_loads_the_published_layout():
    """Through the merge of the adapter and the renaming, to exactly what the full-size model holds."""
    published = published_state("kwaivgi_videoreward")
    assert f"{sum(tensor.numel() for tensor in published.values()) * 2 / 1e9:.2f} GB" == "5.03 GB"  # as the file
    merged = merge_lora(published, 128, torch.bfloat16)
    assert len(published) - len(merged) == 28 * 7 * 2
    backbone, head = split_backbone_and_head(merged, torch.bfloat16)
    reward = video_align.VideoAlign.random_init()
    assert shapes(backbone) == layout_of(reward.vlm.model)
    assert shapes(head) == layout_of(reward.vlm.head)
    build_from_state_dict(
        "video_align", "published", lambda: Qwen2VLModel(Qwen2VLConfig(**video_align.SIZES)), backbone
    )


def test_hps_v3_loads_the_published_layout():
    published = published_state("mizzenai_hpsv3")
    assert f"{sum(tensor.numel() for tensor in published.values()) * 2 / 1e9:.1f} GB" == "16.6 GB"
    backbone, head = split_backbone_and_head(published, torch.bfloat16)
    reward = hps_v3.HpsV3.random_init()
    assert shapes(backbone) == layout_of(reward.vlm.model)
    assert shapes(head) == layout_of(reward.vlm.head)
    assert {parameter.dtype for parameter in reward.vlm.head.parameters()} == {torch.float32}
    build_from_state_dict("hps_v3", "published", lambda: Qwen2VLModel(Qwen2VLConfig(**hps_v3.SIZES)), backbone)


def test_video_score_has_the_published_layout():
    model = video_score.model_class()(Idefics2Config(**video_score.SIZES))
    assert layout_of(model) == published_layout("tiger_lab_videoscore")


def test_viclip_has_the_published_layout():
    published = published_state("opengvlab_viclip")
    assert published.pop("temp").shape == ()
    assert viclip.sizes_in("viclip", published) == viclip.SIZES
    assert layout_of(viclip.ViClip.random_init().model) == shapes(published)


def test_vjepa2_has_the_published_layout():
    assert layout_of(vjepa2.VJepa2.random_init().model) == published_layout("facebook_vjepa2_vitl")
