"""Too-dark and too-bright regions of a decoded video have a gradient in every reward that resizes."""

import pytest
import torch
from reward_checks import PROMPTS
from tiny import tiny_vae
from tiny_clip import letter_tokenizer
from tiny_judges import (
    bert_tokenizer,
    clip,
    image_reward_model,
    mps_model,
    open_clip_of,
    random_model,
    siglip,
    tiny_raft,
)
from tiny_qwen import judge_model
from transformers import ViTConfig, ViTModel, VJEPA2Config, VJEPA2Model

from rewards.catalogue import CATALOGUE
from rewards.common.heads import LinearLayers
from rewards.common.qwen_vl import random_qwen_vl
from rewards.load import import_built_in
from rewards.models import hps_v3, viclip, video_align, video_score
from rewards.models.consistency import Dino
from rlhf.generator import wan_decoder

ONE = {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
QWEN = {
    "text_config": ONE
    | {"vocab_size": 50000, "num_key_value_heads": 1}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
    "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
}
IDEFICS = {
    "text_config": ONE | {"model_type": "mistral", "vocab_size": 50000, "num_key_value_heads": 1},
    "vision_config": ONE | {"image_size": 56, "patch_size": 14},
    "perceiver_config": {"hidden_size": 32, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2}
    | {"resampler_head_dim": 8, "num_key_value_heads": 1},
    "image_token_id": 49999,
    "num_labels": 5,
}
VIDEO_CLIP = {
    "vision": {"patch": 8, "resolution": 32, "frames": 8, "width": 64, "layers": 1, "output": 24},
    "text": {"context_length": 8, "vocab_size": 49408, "width": 64, "layers": 1, "output_dim": 24},
}


def qwen(head, tokens):
    return random_model(lambda: random_qwen_vl(QWEN, head, tokens, torch.float32))


def idefics():
    scorer = random_model(lambda: video_score.random_scorer(IDEFICS, torch.float32))
    scorer.edges = (28, 56)
    return scorer


def jepa():
    sizes = {"crop_size": 32, "patch_size": 8, "frames_per_clip": 8, "hidden_size": 40, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 1, "pred_hidden_size": 24, "pred_num_attention_heads": 2}
    return VJEPA2Model(VJEPA2Config(**sizes, pred_num_hidden_layers=1, pred_num_mask_tokens=3))


def dino():
    return Dino(ViTModel(ViTConfig(**ONE, patch_size=8, image_size=32), add_pooling_layer=False))


MAKE = {  # every built-in reward that resizes, with tiny random weights
    "aesthetic": lambda new: new(LinearLayers(24), clip(), frames="all"),
    "aesthetic_v1": lambda new: new(torch.nn.Linear(24, 1), model=clip(), frames="all"),
    "aesthetic_v2_5": lambda new: new(LinearLayers(48, True), siglip(), frames="all"),
    "background_consistency": lambda new: new(clip()),
    "clip_score": lambda new: new(clip(), frames="all"),
    "hps_v2": lambda new: new(open_clip_of(clip(hidden_act="gelu")), frames="all"),
    "hps_v2_1": lambda new: new(open_clip_of(clip(hidden_act="gelu")), frames="all"),
    "hps_v3": lambda new: new(qwen(hps_v3.preference_head(32), hps_v3.TOKENS), dtype="float32", frames="all"),
    "image_reward": lambda new: new(image_reward_model(), bert_tokenizer(), frames="all"),
    "motion_degree": lambda new: new(tiny_raft(), size=32, num_flow_updates=2),
    "mps": lambda new: new(mps_model(), letter_tokenizer(), frames="all"),
    "nano_clip": lambda new: new(),
    "pickscore": lambda new: new(clip(), frames="all"),
    "subject_consistency": lambda new: new(random_model(dino)),
    "viclip": lambda new: new(random_model(lambda: viclip.ViClipModel(VIDEO_CLIP))),
    "video_align": lambda new: new(
        checkpoint=qwen(torch.nn.Linear(32, 1, bias=False), video_align.TOKENS), dtype="float32"
    ),
    "video_score": lambda new: new(model=idefics(), dtype="float32"),
    "vjepa2": lambda new: new(random_model(jepa)),
    "vlm_question": lambda new: new(model=judge_model("Qwen2VL"), dtype="float32"),
}


@pytest.fixture(scope="module")
def decoded():
    """Latents and two videos of them by `decode_video`: bands just inside the range, and outside."""
    latents = torch.randn(1, 16, 2, 6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain, vae = wan_decoder.decode_unclamped, tiny_vae()

    def decode(excess):
        def banded(*arguments):
            dark, rest, bright = plain(*arguments).split(16, dim=-2)
            return torch.cat([0.005 * dark - 1 - excess, rest, 0.005 * bright + 1 + excess], dim=-2)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wan_decoder, "decode_unclamped", banded)
            return wan_decoder.decode_video(vae, latents)

    inside, outside = decode(-0.01), decode(0.01)
    assert wan_decoder.saturated_share(outside) > 0.6 > wan_decoder.saturated_share(inside)
    return latents, inside, outside


def band_gradients(reward, latents, video):
    """Norms at the latents of the gradient through the inner rows of the dark and of the bright band."""
    pixels = video.detach().requires_grad_()
    (grad,) = torch.autograd.grad(reward(pixels, PROMPTS[:1], fps=8, seed=0, step=0).sum(), pixels)
    norms = []
    for rows in (slice(3, 11), slice(37, 45)):
        inner = torch.zeros_like(grad)
        inner[..., rows, :] = grad[..., rows, :]
        norms.append(torch.autograd.grad(video, latents, inner, retain_graph=True)[0].norm())
    return torch.stack(norms)


@pytest.mark.parametrize("name", MAKE)
def test_a_saturated_band_pulls_as_one_that_is_just_inside(name, decoded, monkeypatch):
    monkeypatch.setattr("rewards.models.hps_v3.PIXELS", 6 * 784)
    monkeypatch.setattr("rewards.models.video_align.MIN_PIXELS", 4 * 784)
    reward, (latents, *videos) = MAKE[name](import_built_in(name)), decoded
    inside, outside = (band_gradients(reward, latents, video) for video in videos)
    assert (inside > 0).all()
    assert ((outside / inside).log().abs() < 1).all()


def test_no_reward_is_forgotten():
    """The others compute on the pixels as they are, or see none."""
    others = {
        "latent_reward",
        "flicker",
        "frame_difference",
        "jpeg_size",
        "smoothness",
        "nano_preference",
        "nano_verifier",
    }
    assert set(CATALOGUE) - set(MAKE) == others
