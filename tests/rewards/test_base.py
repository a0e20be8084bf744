"""The base of rewards that score frames: its settings, cache of prompts, and signature."""

import inspect

import pytest
import torch
from reward_checks import PROMPTS, every_check, make_video

from rewards import RewardError, load_reward
from rewards.common import base
from rewards.common.base import FrameReward
from rewards.common.frames import apply_in_chunks
from rewards.models.clip import ClipScore
from rewards.models.hps import HpsV2
from rewards.models.pickscore import PickScore


class Tint(FrameReward):
    """The share of a colour that the prompt's letters add up to: a reward with weights and text."""

    name = "tint"

    def __init__(self, strength: float = 1.0, **options):
        super().__init__(**options)
        self.colour = torch.nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            self.colour.weight[:] = strength * torch.tensor([0.7, -0.4, 0.21])
        self.colour.to(self.dtype)
        self.calls = []
        self.freeze()

    def encode_text(self, prompts):
        self.calls.append(list(prompts))
        return torch.tensor([1 + sum(map(ord, p)) % 7 / 7 for p in prompts]), torch.tensor([len(p) for p in prompts])

    def score_frames(self, frames_NCHW, weight_N, length_N):
        means_NC = frames_NCHW.to(self.dtype).pow(2).mean((2, 3))
        return self.colour(means_NC).squeeze(1).to(torch.promote_types(self.dtype, torch.float32)) * weight_N


@every_check
def test_the_checks_hold_for_a_plain_subclass(check):
    if check.__name__ != "each_prompt_is_encoded_once":
        check(Tint)


def test_text_rows_go_with_their_frames():
    seen = []
    reward = Tint(frames="all", num_frames=2)
    score = reward.score_frames
    reward.score_frames = lambda *inputs: seen.append(inputs) or score(*inputs)
    video = make_video(3)
    reward(video, ["a", "long prompt"])
    frames, _, length = seen[0]
    assert length.tolist() == [1, 1, 11, 11]
    assert torch.equal(frames, torch.stack([video[0, :, 0], video[0, :, 2], video[1, :, 0], video[1, :, 2]]))
    seen.clear()
    reward.chunk = 3
    reward(video, ["a", "long prompt"])
    assert [len(frames) for frames, *_ in seen] == [3, 1]
    reward.score_frames = lambda *inputs: score(*inputs).bfloat16()
    assert reward(video, ["a", "long prompt"]).dtype == torch.float32, "the mean is not rounded again"


def test_only_new_prompts_are_encoded_and_the_oldest_are_forgotten(monkeypatch):
    monkeypatch.setattr(base, "CACHED_PROMPTS", 3)
    reward = Tint()
    video = make_video(1)
    for prompts in (["a", "b"], ["b", "c"], ["c", "d"], ["b", "a"], ["a", "a"]):
        reward(video, prompts)
    assert reward.calls == [["a", "b"], ["c"], ["d"], ["a"]]
    assert len(reward._texts) == 3


def test_more_prompts_than_are_kept_still_score(monkeypatch):
    video = make_video(1, batch=4)
    wanted = Tint()(video, ["a", "b", "c", "d"])
    monkeypatch.setattr(base, "CACHED_PROMPTS", 1)
    assert torch.equal(Tint()(video, ["a", "b", "c", "d"]), wanted)


def test_chunks_split_every_input_alike_and_are_recomputed():
    rows, calls = torch.arange(5.0, requires_grad=True), []

    def score(x, y):
        calls.append((x.tolist(), y.tolist()))
        return x * y

    result = apply_in_chunks(score, 2, rows, torch.arange(5) + 10)
    result.sum().backward()
    assert calls[:3] == [([0, 1], [10, 11]), ([2, 3], [12, 13]), ([4], [14])]
    assert len(calls) == 6
    assert rows.grad.tolist() == [10, 11, 12, 13, 14]


def test_the_signature_shows_options_that_a_base_class_takes():
    options = set(inspect.signature(FrameReward).parameters)
    assert options == {"frames", "num_frames", "dtype", "chunk", "mean", "std"}
    assert set(inspect.signature(ClipScore).parameters) == options | {"model", "backend", "pretrained"}
    assert set(inspect.signature(PickScore).parameters) == set(inspect.signature(ClipScore).parameters)
    assert set(inspect.signature(HpsV2).parameters) == options | {"checkpoint", "architecture"}
    assert inspect.signature(PickScore).parameters["model"].default == "yuvalkirstain/PickScore_v1"


@pytest.mark.parametrize("name", ["hps_v2", "mps", "image_reward", "pickscore", "aesthetic", "clip_score"])
def test_a_misspelt_option_names_the_nearest_before_anything_is_loaded(name):
    with pytest.raises(RewardError, match="(?i)the nearest name is 'num_frames'"):
        load_reward(name, num_frame=2)


def test_other_arguments_are_checked_before_anything_is_loaded():
    with pytest.raises(RewardError, match="num_frames=0"):
        load_reward("mps", checkpoint="/nowhere", num_frames=0)


def test_mean_and_std_are_kept_for_mixing():
    reward = Tint(mean=0.2, std=0.1)
    assert (reward.mean, reward.std, reward.frames) == (0.2, 0.1, "first")
    assert reward(make_video(), PROMPTS).shape == (2,)
