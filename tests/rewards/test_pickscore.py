"""PickScore: the score against the same weights in open_clip, one prompt a frame."""

import math

import pytest
import torch
from reward_checks import PROMPTS, as_is, every_check, make_video, same
from tiny_clip import letter_tokenizer, save_transformers_clip
from tiny_judges import SIZE, as_open_clip, clip, clip_pixels

from rewards import load_reward
from rewards.models.pickscore import PickScore


def make(**options):
    return PickScore(clip(hidden_act="gelu"), **options)


@every_check
def test_as_any_reward_of_frames(check):
    check(make)


def by_open_clip(frames, prompts):
    """exp(logit_scale) * cosine by open_clip, the pixels by the published processor."""
    model = as_open_clip(make().clip.model)
    tokens = letter_tokenizer()(prompts, padding="max_length", truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        image = model.encode_image(clip_pixels(frames), normalize=True)
        text = model.encode_text(tokens.input_ids, normalize=True)
        return model.logit_scale.exp() * (image * text).sum(1)


def test_the_score_is_that_of_open_clip():
    frames = as_is(SIZE)
    scores = make()(frames, PROMPTS)
    same(scores, by_open_clip(frames, PROMPTS))
    assert scores.diff().abs() > 0.01


def test_each_frame_is_scored_against_its_own_prompt():
    """The published code takes row 0 of the products, which is wrong for many prompts."""
    frames, reward = as_is(SIZE), make()
    both = reward(frames, PROMPTS)
    same(both[1:], reward(frames[1:], PROMPTS[1:]))
    assert (both[1] - reward(frames, [PROMPTS[0]] * 2)[1]).abs() > 0.01


def test_it_is_the_cosine_times_the_learned_scale(tmp_path):
    folder = str(save_transformers_clip(tmp_path / "clip"))
    cosine, score = load_reward("clip_score", model=folder), load_reward("pickscore", model=folder)
    video = make_video()
    same(score(video, PROMPTS), cosine(video, PROMPTS) * score.clip.model.logit_scale.exp())
    assert score.clip.scale == pytest.approx(14.28, abs=0.01)  # as CLIP is initialised


def test_the_scale_is_not_rounded_with_the_model():
    trained = clip(hidden_act="gelu")
    trained.model.logit_scale.data.fill_(math.log(100))
    reward = PickScore(type(trained)(trained.model, trained.tokenizer), dtype="bfloat16")
    assert reward.clip.scale.item() == pytest.approx(100, abs=1e-3)
