"""VideoAlign: frames, text and score against transformers' and peft's own route."""

import math
from functools import partial

import pytest
import torch
from reward_checks import PROMPTS, assert_contract, every_video_check, make_video, the_gradient_equals_finite_difference
from tiny_qwen import WIDTH, hidden_states, in_float64, name_in_445, random_model, save_base
from transformers import Qwen2VLVideoProcessor

from rewards import RewardError, load_reward
from rewards.models.video_align import PROMPT, TOKENS, VideoAlign, frames_at_rate


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("qwen"), PROMPT.format(text_prompt=" ".join(PROMPTS)))


@pytest.fixture(scope="module")
def tuned(base):
    """transformers' model with a LoRA of peft, its tokenizer, and the head."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = random_model(base, TOKENS)
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "visual" not in name and name != "lm_head"
    ]
    lora = LoraConfig(r=4, lora_alpha=128, target_modules=targets, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tuned = get_peft_model(model, lora).eval()
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape) * 0.02
        head = torch.randn(1, WIDTH)
    return tuned, tokenizer, head


@pytest.fixture(scope="module")
def checkpoint(base, tuned):
    """In the published layout: a whole PEFT state dict, named as in transformers 4.45."""
    model, _, head = tuned
    state = {f"base_model.model.{name_in_445(k[17:])}": v for k, v in model.state_dict().items()}
    torch.save(state | {"base_model.model.rm_head.weight": head}, f"{base}/model.pth")
    return f"{base}/model.pth"


@pytest.fixture(scope="module")
def make(base, checkpoint):
    return partial(load_reward, "video_align", checkpoint=checkpoint, model=base, dtype="float32")


@pytest.fixture
def few_pixels(monkeypatch):
    monkeypatch.setattr("rewards.models.video_align.MIN_PIXELS", 4 * 784)
    monkeypatch.setattr("rewards.models.video_align.MAX_PIXELS", 9 * 784)


def test_the_score_equals_transformers_and_pefts(tuned, make):
    """The adapter not merged, the published processor, placeholders, padding and mask."""
    model, tokenizer, head = tuned
    video = (make_video(24, 308, 364) * 255).round() / 255  # whole tokens, so nothing is resized
    frames = (video[:, :, [0, 8, 15, 23]] * 255).to(torch.uint8).transpose(1, 2)  # 2 fps out of 12, at least 4 frames
    processor = Qwen2VLVideoProcessor(
        size={"shortest_edge": 100352, "longest_edge": 200704}, cap_pixels_per_frame=False
    )
    pixels = processor(list(frames), return_tensors="pt")
    texts = [PROMPT.format(text_prompt=prompt) for prompt in PROMPTS]
    hidden, ids = hidden_states(
        model.base_model.model, tokenizer, "video", pixels.pixel_values_videos, pixels.video_grid_thw, texts
    )
    places = torch.stack([(ids == number).int().argmax(1) for number in tokenizer.convert_tokens_to_ids(TOKENS)], 1)
    logits = torch.stack([hidden[i, places[i]] for i in range(2)]) @ head[0]
    expected = torch.stack(
        [(logits[:, 0] - 3.6757) / 2.2476, (logits[:, 1] - 1.1646) / 1.3811, (logits[:, 2] - 2.8105) / 2.5121], 1
    )
    got = make().dimensions(video, PROMPTS, fps=12)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (got[0] - got[1]).abs().min() > 1e-3


def test_dimensions_and_their_sum(make, few_pixels):
    video = make_video(4)
    each = torch.stack([make(dimension=name)(video, PROMPTS) for name in ("quality", "motion", "text")], 1)
    assert torch.equal(each, make().dimensions(video, PROMPTS))
    torch.testing.assert_close(make()(video, PROMPTS), each.sum(1))
    mixed = make(dimension={"text": 2, "motion": 0.5})(video, PROMPTS)
    torch.testing.assert_close(mixed, 2 * each[:, 2] + each[:, 1] / 2)
    with pytest.raises(RewardError, match="dimension='visual'.*one of quality, motion, text or overall"):
        make(dimension="visual")


def published_frames(total, fps):
    """smart_nframes and uniform sampling of vision_process.py, written from its description."""
    most = math.floor(min(768, total) / 2) * 2
    count = round(min(max(total / fps * 2.0, 4), most) / 2) * 2
    count = min(count, total)
    return [int(x) for x in torch.linspace(0, total - 1, count).round()]


@pytest.mark.parametrize("fps", [8, 24, 29.97])
def test_frames_are_the_published_ones(fps):
    for total in [2, 3, 4, 5, 17, 81, 125, 200]:
        assert frames_at_rate(total, fps) == published_frames(total, fps)
    assert frames_at_rate(125, 24) == [0, 14, 28, 41, 55, 69, 83, 96, 110, 124]
    times = [0.0, 0.1, 0.2, 0.3, 2.0, 4.0]  # of six frames in 4.5 s: at 0, .8, 1.6, 2.4, 3.2 and 4 s
    assert frames_at_rate(6, 6 / 4.5, times) == [0, 3, 4, 4, 5, 5]


def test_the_callers_frame_rate_goes_before_the_setting(make, few_pixels):
    video = make_video(33, batch=1)
    seen = []
    reward = make(fps=8)
    fit = reward.vlm.fit
    reward.vlm.fit = lambda frames, *pixels: seen.append(frames.shape[2]) or fit(frames, *pixels)
    reward(video, PROMPTS[:1])
    reward(video, PROMPTS[:1], fps=4)
    assert seen == [8, 16]
    with pytest.raises(RewardError, match="1 frame"):
        reward(video[:, :, :1], PROMPTS[:1])


@every_video_check
def test_as_any_video_reward(check, make, few_pixels, monkeypatch):
    if check is the_gradient_equals_finite_difference:
        in_float64(monkeypatch)
    check(lambda **settings: make(fps=8, **settings), make_video(6, 48, 64))


def test_random_weights_score_without_a_tokenizer(tuned, monkeypatch, few_pixels):
    """What the benchmark builds, at a small size: it scores and has a gradient."""
    config = tuned[0].config
    sizes = {"text_config": config.text_config.to_dict(), "vision_config": config.vision_config.to_dict()}
    monkeypatch.setattr("rewards.models.video_align.SIZES", sizes)
    assert_contract(VideoAlign.random_init(dtype="float32", fps=8))
