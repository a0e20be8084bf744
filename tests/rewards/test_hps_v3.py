"""HPSv3: text and score against transformers' own route; frames; what is refused."""

from functools import partial

import pytest
import torch
from reward_checks import (
    PROMPTS,
    assert_contract,
    every_video_check,
    make_video,
    the_gradient_equals_finite_difference,
    to_pil,
)
from safetensors.torch import save_file
from tiny_qwen import WIDTH, hidden_states, in_float64, name_in_445, random_model, save_base
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rewards import load_reward
from rewards.models.hps_v3 import PROMPT, TOKENS, HpsV3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("qwen"), PROMPT.format(text_prompt=" ".join(PROMPTS)))


@pytest.fixture(scope="module")
def published(base):
    """transformers' model, its tokenizer, and the head's weights by their published names."""
    shapes = {"0.weight": (1024, WIDTH), "0.bias": (1024,), "3.weight": (16, 1024), "3.bias": (16,)}
    shapes |= {"5.weight": (2, 16), "5.bias": (2,)}
    generator = torch.Generator().manual_seed(2)
    head = {f"rm_head.{key}": torch.randn(shape, generator=generator) * 0.2 for key, shape in shapes.items()}
    return *random_model(base, TOKENS), head


@pytest.fixture(scope="module")
def make(base, published):
    model, _, head = published
    state = {name_in_445(key): tensor for key, tensor in model.state_dict().items()} | head
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, f"{base}/HPSv3.safetensors")

    return partial(load_reward, "hps_v3", checkpoint=f"{base}/HPSv3.safetensors", model=base, dtype="float32")


@pytest.fixture
def few_pixels(monkeypatch):
    monkeypatch.setattr("rewards.models.hps_v3.PIXELS", 6 * 784)


def test_the_score_equals_transformers(published, make):
    """The published processor, the model's own placeholders, padding and mask, the head by hand."""
    model, tokenizer, head = published
    video = (make_video(1, 448, 448) * 255).round() / 255  # as large as the model takes it, so nothing is resized
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 256 * 784, "longest_edge": 256 * 784})
    pixels = processor(to_pil(video[:, :, 0]), return_tensors="pt")
    texts = [PROMPT.format(text_prompt=prompt) for prompt in PROMPTS]
    hidden, ids = hidden_states(model, tokenizer, "image", pixels.pixel_values, pixels.image_grid_thw, texts)
    at_token = hidden[ids == tokenizer.convert_tokens_to_ids("<|Reward|>")]
    x = (at_token @ head["rm_head.0.weight"].T + head["rm_head.0.bias"]).clamp(min=0)
    x = (x @ head["rm_head.3.weight"].T + head["rm_head.3.bias"]).clamp(min=0)
    expected, log_spread = (x @ head["rm_head.5.weight"].T + head["rm_head.5.bias"]).unbind(1)
    unsure = make(uncertainty=1.5)(video, PROMPTS)
    torch.testing.assert_close(unsure, expected - 1.5 * log_spread.exp(), atol=1e-5, rtol=1e-5)
    got = make()(video, PROMPTS)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert got.diff().abs() > 1e-3


def test_the_score_is_the_mean_over_the_chosen_frames(make, few_pixels):
    video = make_video(5)
    each = torch.stack([make()(video[:, :, i : i + 1], PROMPTS) for i in range(5)])
    torch.testing.assert_close(make(frames="all")(video, PROMPTS), each.mean(0), atol=1e-5, rtol=1e-5)
    three = make(frames="all", num_frames=3)(video, PROMPTS)
    torch.testing.assert_close(three, each[[0, 2, 4]].mean(0), atol=1e-5, rtol=1e-5)


@every_video_check
def test_as_any_video_reward(check, make, few_pixels, monkeypatch):
    if check is the_gradient_equals_finite_difference:
        in_float64(monkeypatch)
    check(lambda **settings: make(frames="all", **settings), make_video(2, 48, 64))


def test_random_weights_score_without_a_tokenizer(published, monkeypatch, few_pixels):
    """What the benchmark builds, at a small size: it scores and has a gradient."""
    config = published[0].config
    sizes = {"text_config": config.text_config.to_dict(), "vision_config": config.vision_config.to_dict()}
    monkeypatch.setattr("rewards.models.hps_v3.SIZES", sizes)
    assert_contract(HpsV3.random_init(dtype="float32"))
