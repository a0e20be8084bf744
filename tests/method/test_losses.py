"""The loss is minus the score; a score is the reward's, the opposite, or relative to words."""

import math

import pytest
import torch

from rewards import RewardMix
from rlhf.method.losses import perturb, reward_loss, score, score_metrics
from rlhf.types import Prompt


def length(video, prompts, **info):
    """A reward that depends on both: brightness times the length of the prompt."""
    return video.mean((1, 2, 3, 4)) * torch.tensor([float(len(p)) for p in prompts])


VIDEO, PROMPTS = torch.full((2, 3, 1, 4, 4), 0.5), ["rain", "a red fox"]


def test_descending_the_loss_ascends_the_mean_score():
    scores = torch.tensor([1.0, 4.0], requires_grad=True)
    loss = reward_loss(scores)
    loss.backward()
    assert loss.item() == -2.5
    assert scores.grad.tolist() == [-0.5, -0.5]


def test_a_score_is_the_rewards_and_a_penalty_its_opposite():
    mix = RewardMix({"length": length})
    scores, raw = score(mix, VIDEO, PROMPTS)
    assert scores.tolist() == raw["length"].tolist() == [2.0, 4.5]
    assert score(mix, VIDEO, PROMPTS, penalty=True)[0].tolist() == [-2.0, -4.5]


def test_rewards_are_told_what_else_is_known():
    told = []
    mix = RewardMix({"curious": lambda video, prompts, **info: told.append(info) or video.mean((1, 2, 3, 4))})
    score(mix, VIDEO, PROMPTS, {"step": 3})
    score(mix, VIDEO, PROMPTS, {"step": 4}, ["a", "b"])
    assert [info.pop("rows") for info in told] == [[{"prompt": prompt} for prompt in PROMPTS]] * 3
    assert told == [{"step": 3}, {"step": 4}, {"step": 4}]


def test_words_before_a_prompt_leave_its_row_as_it_is():
    told, prompts = [], [Prompt("rain", {"target": "blue"})]
    mix = RewardMix(
        {"curious": lambda video, prompts, rows: told.append((*prompts, *rows)) or video.mean((1, 2, 3, 4))}
    )
    score(mix, VIDEO[:1], prompts, words=["a", "b"])
    assert told == [(f"{word}. rain", {"prompt": "rain", "target": "blue"}) for word in "ab"]
    assert prompts[0].read == set()


def test_relative_words_take_the_difference_and_a_penalty_exchanges_them():
    mix, words = RewardMix({"length": length}), ["sharp", "out of focus"]  # "sharp. " has 7 letters, the other 14
    liked, disliked = [5.5, 8.0], [9.0, 11.5]
    scores, raw = score(mix, VIDEO, PROMPTS, {}, words, 0.2)
    assert scores.tolist() == pytest.approx([1.2 * a - b for a, b in zip(liked, disliked, strict=True)])
    assert raw["length"].tolist() == liked
    scores, raw = score(mix, VIDEO, PROMPTS, {}, words, 0.2, penalty=True)
    assert scores.tolist() == pytest.approx([1.2 * b - a for a, b in zip(liked, disliked, strict=True)])
    assert raw["length"].tolist() == disliked


def test_metrics_are_means_and_spreads_of_single_rewards():
    metrics = score_metrics(["loss", "rewards/a"], torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert metrics == {"loss": 2.0, "rewards/a": 4.0, "rewards/a_std": 2.0}
    assert math.isnan(score_metrics(["loss"], torch.tensor([[math.nan]]))["loss"])


# ---------------------------------------- robust rewards


def curved(video, prompts, **info):
    """A reward whose gradient changes from place to place, and differs between videos."""
    grid = torch.linspace(0, 3, video[0].numel(), dtype=video.dtype).view(video.shape[1:])
    return (torch.sin(4 * video * grid) * grid).mean((1, 2, 3, 4))


def middle_video() -> torch.Tensor:
    return 0.3 + 0.4 * torch.rand(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("words", [None, ["sharp", "out of focus"]])
def test_a_robust_gradient_is_the_finite_difference_at_the_video_moved_against_its_score(words):
    mix, length, video = RewardMix({"curved": curved}), 0.05, middle_video().requires_grad_()
    scores, raw = score(mix, video, PROMPTS, words=words, strength=0.2, perturbation=length)
    plain, plain_raw = score(mix, video, PROMPTS, words=words, strength=0.2)
    assert torch.equal(scores, plain), "what is logged is the video's own score"
    assert torch.equal(raw["curved"], plain_raw["curved"])
    gradient = torch.autograd.grad(scores.sum(), video)[0]

    ascent = torch.autograd.grad(plain.sum(), video)[0]
    moved = video.detach() - length * ascent / ascent.square().mean((1, 2, 3, 4), keepdim=True).sqrt()
    assert moved.min() > 0
    assert moved.max() < 1
    at = lambda pixels: score(mix, pixels, PROMPTS, words=words, strength=0.2)[0]
    assert (at(moved) < plain).all()
    direction = torch.randn(video.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    difference = (at(moved + 1e-6 * direction) - at(moved - 1e-6 * direction)).sum() / 2e-6
    assert difference.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-6)
    assert (gradient - ascent).norm() > 0.1 * ascent.norm()


def test_a_moved_video_stays_a_video_and_no_gradient_moves_nothing():
    video = middle_video().requires_grad_()
    moved, _, _ = perturb(lambda pixels: (curved(pixels, PROMPTS), {}), video, 10.0)
    assert (moved.min(), moved.max()) == (0, 1)
    assert torch.equal(torch.autograd.grad(moved.sum(), video)[0], torch.ones_like(video))
    still, _, _ = perturb(lambda pixels: (0 * pixels.sum((1, 2, 3, 4)), {}), video, 10.0)
    assert torch.equal(still, video)
