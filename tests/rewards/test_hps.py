"""HPS: preprocessing against its published pipeline, the score against transformers, and files."""

import json

import open_clip
import pytest
import torch
from reward_checks import PROMPTS, as_is, every_check, same
from tiny_clip import save_open_clip
from tiny_judges import SIZE, clip, open_clip_of

from rewards import RewardError, load_reward
from rewards.common.preprocess import CLIP_MEAN, CLIP_STD, preprocess
from rewards.models.hps import HpsV2, HpsV21, random_open_clip


def make(kind=HpsV21, **options):
    return kind(open_clip_of(clip(hidden_act="gelu")), **options)


@every_check
def test_as_any_reward_of_frames(check):
    check(make)


@pytest.mark.parametrize("kind", [HpsV2, HpsV21])
def test_the_score_is_the_plain_cosine_of_transformers(kind):
    """The same weights in transformers; a frame of half the height in a black square."""
    frames, twin = as_is(SIZE)[..., SIZE // 4 : -SIZE // 4, :], clip(hidden_act="gelu")
    square = torch.zeros(2, 3, SIZE, SIZE)
    square[..., SIZE // 4 : -SIZE // 4, :] = frames[:, :, 0]
    mean, std = (torch.tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        tokens = twin.tokenizer(PROMPTS, padding="max_length", max_length=24, return_tensors="pt")
        out = twin.model(pixel_values=(square - mean) / std, input_ids=tokens.input_ids)
    scores = make(kind)(frames, PROMPTS)
    same(scores, (out.image_embeds * out.text_embeds).sum(1))
    assert scores.diff().abs() > 1e-3


# ---------------------------------------- files


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny stand-in for the published file (weights under "state_dict"), and its model."""
    folder = save_open_clip(tmp_path_factory.mktemp("hps") / "clip", own_tokenizer=False)
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (folder / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-hps.json")
    model = open_clip.create_model(f"local-dir:{folder}")
    half = {key: value.half() for key, value in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": half}, folder / "HPS_v2.1_compressed.pt")
    return folder


def test_the_published_file_is_read(published):
    """Half-precision weights under "state_dict", with open_clip's own tokenizer."""
    path, frames = str(published / "HPS_v2.1_compressed.pt"), as_is(SIZE)
    reward = load_reward("hps_v2_1", checkpoint=path, architecture="tiny-hps")
    model = open_clip.create_model(f"local-dir:{published}").half().float()
    with torch.no_grad():
        image = model.encode_image(preprocess(frames[:, :, 0], SIZE), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer("tiny-hps")(PROMPTS), normalize=True)
    same(reward(frames, PROMPTS), (image * text).sum(1))
    assert reward.clip.fit == "pad"
    assert {parameter.dtype for parameter in reward.parameters()} == {torch.float32}


def test_the_size_and_normalisation_are_those_of_the_architecture():
    with torch.device("meta"):
        config = random_open_clip("ViT-H-14").visual.preprocess_cfg
    assert config["size"] == 224
    assert (tuple(config["mean"]), tuple(config["std"])) == (CLIP_MEAN, CLIP_STD)


def test_another_layout_is_refused(published):
    path = str(published / "HPS_v2.1_compressed.pt")
    with pytest.raises(RewardError, match=r"ln_final.bias is \(32,\).*expected ln_final.bias: \(512,\)"):
        load_reward("hps_v2_1", checkpoint=path, architecture="ViT-B-32")
