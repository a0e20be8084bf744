"""VideoScore: frames, sizes, text and score against transformers' processor and model."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from reward_checks import (
    PHOTOGRAPH_SIZES,
    PROMPTS,
    assert_contract,
    assert_grey_levels,
    every_video_check,
    make_video,
    photograph_and_noise,
    the_gradient_equals_finite_difference,
    to_pil,
)
from tiny_qwen import tokenizer_for
from transformers import AutoTokenizer, Idefics2Config, Idefics2Processor
from transformers.models.idefics2 import modeling_idefics2
from transformers.models.idefics2.image_processing_idefics2 import Idefics2ImageProcessor
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.mistral import modeling_mistral

from rewards import RewardError, load_reward
from rewards.common.preprocess import resize
from rewards.models.video_score import ASPECTS, PROMPT, VideoScore, model_class, subsample_indices, target_size

WIDTH, LATENTS = 32, 3
SPECIAL = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
EDGES = {"shortest_edge": 28, "longest_edge": 98}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model in the layout of the published repository."""
    folder = tmp_path_factory.mktemp("video_score")
    tokenizer = tokenizer_for(PROMPT.replace("{text_prompt}", " ".join(PROMPTS)))
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.save_pretrained(folder)
    Idefics2ImageProcessor(size=EDGES, do_image_splitting=False).save_pretrained(folder)
    attention = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": WIDTH, "intermediate_size": 48}
    config = Idefics2Config(
        text_config=attention
        | {"model_type": "mistral", "vocab_size": len(tokenizer), "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
        vision_config=attention | {"image_size": 98, "patch_size": 14},
        perceiver_config={
            "hidden_size": WIDTH,
            "resampler_n_latents": LATENTS,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        num_labels=5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class()(config)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.3 + (parameter.ndim == 1) * 0.5
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make(folder):
    return partial(load_reward, "video_score", model=str(folder), dtype="float32")


def test_the_score_equals_transformers(folder, make):
    """Its processor, placeholders, padding and mask, its model; the head by hand."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = Idefics2ImageProcessorPil.from_pretrained(folder)
    processor = Idefics2Processor(images, tokenizer, image_seq_len=LATENTS)
    model = model_class().from_pretrained(folder).eval()
    for name, module in model.named_modules():
        if "perceiver_resampler" in name and hasattr(module, "variance_epsilon"):
            module.variance_epsilon = model.config.text_config.rms_norm_eps
    video = (make_video(3, 56, 84) * 255).round() / 255  # no side outside the edges, so nothing is resized
    scores = []
    for sample, prompt in zip(video, PROMPTS, strict=True):
        text = PROMPT.format(text_prompt=prompt) + "<image> " * 3
        inputs = processor(text=text, images=to_pil(sample.transpose(0, 1)), return_tensors="pt")
        with torch.no_grad():
            scores.append(model.score(model.model(**inputs).last_hidden_state[0, -1]))
    got = make().aspects(video, PROMPTS)
    torch.testing.assert_close(got, torch.stack(scores), atol=1e-5, rtol=1e-5)
    assert (got[0] - got[1]).abs().min() > 1e-3


def test_dimensions_and_their_mean(make):
    video = make_video(3)
    each = torch.stack([make(dimension=name)(video, PROMPTS) for name in ASPECTS], 1)
    assert torch.equal(each, make().aspects(video, PROMPTS))
    torch.testing.assert_close(make()(video, PROMPTS), each.mean(1))
    torch.testing.assert_close(make(dimension={"dynamic_degree": 3})(video, PROMPTS), 3 * each[:, 2])
    for wrong in ("visual", {}, {"mean": 2}, {"visual_quality": 1, "more": 1}):
        with pytest.raises(RewardError, match="got dimension=.*visual_quality, .* or mean, or a weight"):
            make(dimension=wrong)


@pytest.mark.parametrize("size", [*PHOTOGRAPH_SIZES, (1080, 1920), (1500, 700)])
def test_pixels_equal_the_published_processors(size):
    """Idefics2's on PIL images and on uint8 tensors."""
    for image in photograph_and_noise(*size):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        height, width = target_size(*size, 378, 980)
        ours = resize(image[None] / 255, height, width, "bilinear")
        for kind, given in ((Idefics2ImageProcessorPil, picture), (Idefics2ImageProcessor, image)):
            theirs = kind(do_normalize=False)(given, return_tensors="pt").pixel_values[0]
            assert theirs.shape == ours.shape
            assert_grey_levels((ours - theirs) * 255)


def test_normalisation(make):
    seen = []
    reward = make()
    reward.scorer.model.vision_model.forward = lambda pixel_values: seen.append(pixel_values) or 1 / 0
    with pytest.raises(ZeroDivisionError):
        reward(torch.full((1, 3, 1, 56, 56), 0.75), PROMPTS[:1])
    torch.testing.assert_close(seen[0], torch.full((1, 3, 56, 56), 0.5))


def test_an_even_grey_frame_is_a_frame(make):
    """transformers' own route takes pixels of exactly 0 for padding, and stops."""
    assert make()(torch.full((2, 3, 2, 56, 56), 0.5), PROMPTS).isfinite().all()


def test_frames_are_the_published_ones():
    for total in range(1, 1001):
        every = np.arange(total) if total <= 48 else np.arange(0, total, total / 48).astype(int)
        assert subsample_indices(48, total) == every.tolist()


def test_max_frames(make):
    video = make_video(7)
    torch.testing.assert_close(
        make(max_frames=3)(video, PROMPTS), make()(video[:, :, [0, 2, 4]], PROMPTS), atol=1e-5, rtol=1e-5
    )


def test_the_resampler_has_the_epsilon_it_was_trained_with(make):
    """Idefics2Config gives it 1e-6 where the file states none; the language model has 1e-5."""
    model = make().scorer.model
    text = model.config.text_config.rms_norm_eps
    assert model.connector.perceiver_resampler.norm.variance_epsilon == text == 1e-3
    assert Idefics2Config().perceiver_config.rms_norm_eps != Idefics2Config().text_config.rms_norm_eps


@every_video_check
def test_as_any_video_reward(check, make, monkeypatch):
    def norm(self, x):  # transformers' computes in float32
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    if check is the_gradient_equals_finite_difference:
        monkeypatch.setattr(modeling_idefics2.Idefics2RMSNorm, "forward", norm)
        monkeypatch.setattr(modeling_mistral.MistralRMSNorm, "forward", norm)
    check(make, make_video(2, 40, 120))


def test_the_head_stays_float32(make):
    assert make(dtype="bfloat16").scorer.head.weight.dtype == torch.float32


def test_a_prompt_with_an_image_token_is_refused(make):
    with pytest.raises(RewardError, match="<image> in the prompt"):
        make()(make_video(1), ["a <image> of", "a dog"])


def test_split_images_are_refused(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "preprocessor_config.json").unlink()
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | {"do_image_splitting": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(RewardError, match="do_image_splitting"):
        load_reward("video_score", model=str(tmp_path))


def test_random_weights_score_without_a_tokenizer(folder, monkeypatch):
    """What the benchmark builds, at a small size: it scores and has a gradient."""
    config = Idefics2Config.from_pretrained(folder)
    parts = ("text_config", "vision_config", "perceiver_config")
    sizes = {part: getattr(config, part).to_dict() for part in parts} | {"num_labels": 5}
    monkeypatch.setattr("rewards.models.video_score.SIZES", sizes | {"image_token_id": config.image_token_id})
    assert_contract(VideoScore.random_init(dtype="float32"), (3, 2, 400, 420))
