"""HPS: preprocessing against PIL, the score against open_clip's own parts, and missing weights."""

import json

import numpy as np
import open_clip
import pytest
import torch
from layouts import layout_of, published_layout
from PIL import Image
from tiny_clip import save_open_clip

from rewards import RewardError, load_reward, probe
from rewards.hps import HpsV2, HpsV21
from rewards.preprocess import CLIP_MEAN, CLIP_STD, preprocess, resize_longer_and_pad

PROMPTS = ["a red circle", "rain"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny stand-in for the published file, in its layout: weights under "state_dict"; and the model in it."""
    folder = save_open_clip(tmp_path_factory.mktemp("hps") / "clip", own_tokenizer=False)
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (folder / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-hps.json")
    model = open_clip.create_model(f"local-dir:{folder}")
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return {"checkpoint": str(folder / "HPS_v2.1_compressed.pt"), "architecture": "tiny-hps"}, model


@pytest.mark.parametrize("size", [(480, 832), (832, 480), (100, 100), (37, 224)])
def test_padding_equals_pil(size):
    """480x832 becomes 129x224 with bars of 47 above and 48 below."""
    height, width = size
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.BICUBIC)
    scale = 224 / max(size)
    small = image.resize((round(width * scale), round(height * scale)), Image.BICUBIC)
    square = Image.new("RGB", (224, 224))
    square.paste(small, ((224 - small.width) // 2, (224 - small.height) // 2))

    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    difference = (
        resize_longer_and_pad(x, 224)[0].permute(1, 2, 0) * 255 - torch.from_numpy(np.array(square)).float()
    ).abs()
    assert difference.mean() < 0.5
    assert difference.max() <= 4
    if size == (480, 832):
        padded = resize_longer_and_pad(torch.ones(1, 1, *size), 224)[0, 0, :, 112]
        assert (padded[:47] == 0).all()
        torch.testing.assert_close(padded[47:176], torch.ones(129))
        assert (padded[176:] == 0).all()


def test_bars_are_black_before_normalising():
    x = preprocess(torch.ones(1, 3, 20, 40), 40, CLIP_MEAN, CLIP_STD, "pad")
    black = torch.tensor([-m / s for m, s in zip(CLIP_MEAN, CLIP_STD, strict=True)])
    torch.testing.assert_close(x[0, :, 0, 0], black)


def test_score_is_the_plain_cosine_of_the_padded_frame(published):
    settings, model = published
    reward = load_reward("hps_v2_1", **settings)
    video = torch.rand(2, 3, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    pixels = preprocess(video[:, :, 0], 32, fit="pad")
    with torch.no_grad():
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(open_clip.get_tokenizer("tiny-hps")(PROMPTS), normalize=True)
    torch.testing.assert_close(reward(video[:, :, :1], PROMPTS), (image * text).sum(1), rtol=1e-4, atol=1e-5)
    assert reward.name == "hps_v2_1"
    assert probe(reward, (3, 5, 48, 80)).frames == 1


@pytest.mark.parametrize("name", ["hps_v2", "hps_v2_1"])
def test_missing_weights_are_named(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RewardError, match="xswu/HPSv2.*`checkpoint`"):
        load_reward(name)
    with pytest.raises(RewardError, match="no file at /nowhere/x.pt; expected HPS_v2"):
        load_reward(name, checkpoint="/nowhere/x.pt")


@pytest.mark.parametrize("reward", [HpsV2, HpsV21])
def test_full_size_has_the_published_layout(reward):
    with torch.device("meta"):
        clip = reward.random_init().clip
    assert layout_of(clip.model) == published_layout("xswu_hpsv2_vit_h_14")
    assert (clip.size, clip.fit) == (224, "pad")
