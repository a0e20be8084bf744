"""Mixing: weights, normalisation, frames, the breakdown, and errors that name reward and prompt."""

import pytest
import torch

from rewards import RewardError, RewardMix, frames_needed

PROMPTS = ["a red circle", "a blue square"]


class Mean:
    def __init__(self, gain=1.0, **attributes):
        self.gain, self.seen = gain, []
        self.__dict__.update(attributes)

    def __call__(self, video, prompts, **info):
        self.seen.append((video.shape[2], video.requires_grad, torch.is_grad_enabled(), info))
        return self.gain * video.mean(dim=(1, 2, 3, 4))


@pytest.fixture
def video():
    return torch.rand(2, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_the_total_is_the_weighted_sum_and_the_breakdown_is_raw(video):
    total, breakdown = RewardMix({"a": Mean(1.0), "b": Mean(10.0)}, [2.0, -0.5])(video, PROMPTS)
    mean = video.mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(total, 2.0 * mean - 0.5 * 10.0 * mean)
    torch.testing.assert_close(breakdown["a"], mean.detach())
    torch.testing.assert_close(breakdown["b"], 10 * mean.detach())
    assert not any(scores.requires_grad for scores in breakdown.values())
    grad = torch.autograd.grad(total.sum(), video)[0]
    torch.testing.assert_close(grad, torch.full_like(grad, -3.0 / video[0].numel()))


def test_weights_default_to_one(video):
    total, _ = RewardMix({"a": Mean(1.0), "b": Mean(2.0)})(video, PROMPTS)
    torch.testing.assert_close(total, 3.0 * video.mean(dim=(1, 2, 3, 4)))


def test_normalisation_by_stated_mean_and_std(video):
    rewards = {"stated": Mean(mean=0.25, std=0.1), "silent": Mean()}
    mean = video.mean(dim=(1, 2, 3, 4))
    total, breakdown = RewardMix(rewards, [1.0, 3.0])(video, PROMPTS)
    torch.testing.assert_close(total, (mean - 0.25) / 0.1 + 3 * mean)
    torch.testing.assert_close(breakdown["stated"], mean.detach())
    total, _ = RewardMix(rewards, [1.0, 3.0], normalise=False)(video, PROMPTS)
    torch.testing.assert_close(total, 4 * mean)


def test_each_reward_sees_only_the_frames_it_asked_for(video):
    rewards = {"first": Mean(frames="first"), "three": Mean(frames=3), "all": Mean(frames="all")}
    RewardMix(rewards)(video, PROMPTS)
    assert [reward.seen[0][0] for reward in rewards.values()] == [1, 3, 5]


@pytest.mark.parametrize(
    ("asked", "needed"), [(["first"], 1), (["first", 3], 3), ([2, "all"], 17), (["first", "first"], 1)]
)
def test_the_mix_asks_for_the_most_frames(asked, needed):
    assert frames_needed(RewardMix({str(i): Mean(frames=f) for i, f in enumerate(asked)}), 17) == needed


def test_info_is_passed_on(video):
    reward = Mean()
    RewardMix({"a": reward})(video, PROMPTS, fps=24, step=3)
    assert reward.seen[0][3] == {"fps": 24, "step": 3}


def test_weight_zero_is_logged_without_gradient(video):
    silent = Mean()
    total, breakdown = RewardMix({"a": Mean(), "b": silent}, [1.0, 0.0])(video, PROMPTS)
    torch.testing.assert_close(total, video.mean(dim=(1, 2, 3, 4)))
    assert silent.seen[0][2] is False
    assert "b" in breakdown


def test_half_precision_scores_are_summed_in_float32(video):
    class Half:
        def __call__(self, video, prompts, **info):
            return video.mean(dim=(1, 2, 3, 4)).bfloat16()

    total, breakdown = RewardMix({"a": Half(), "b": Mean(1e-3)})(video, PROMPTS)
    assert total.dtype == breakdown["a"].dtype == torch.float32
    assert (total - breakdown["a"]).abs().min() > 1e-4


def test_float64_stays_float64(video):
    total, _ = RewardMix({"a": Mean()})(video.double(), PROMPTS)
    assert total.dtype == torch.float64


def test_an_evaluation_reward_can_not_be_trained_on(video):
    mix = RewardMix({"judge": Mean(differentiable=False)})
    with pytest.raises(RewardError, match="judge.*eval_reward_funcs"):
        mix(video, PROMPTS)
    with torch.no_grad():
        mix(video, PROMPTS)
    RewardMix({"judge": Mean(differentiable=False)}, [0.0])(video, PROMPTS)


@pytest.mark.parametrize(
    ("scores", "got"),
    [
        (lambda video: video.mean(), r"shape \(\)"),
        (lambda video: video.mean(dim=(1, 3, 4)), r"shape \(2, 5\)"),
        (lambda video: video.mean(dim=(1, 2, 3, 4)) / torch.tensor([1.0, 0.0]), "inf for prompt 'a blue square'"),
        (lambda video: [0.0, 0.0], "a list"),
    ],
)
def test_bad_scores_name_the_reward(video, scores, got):
    with pytest.raises(RewardError, match=got) as caught:
        RewardMix({"fine": Mean(), "broken": lambda video, prompts, **info: scores(video)})(video, PROMPTS)
    assert "'broken'" in str(caught.value)


@pytest.mark.parametrize(("names", "weights"), [("ab", [1.0]), ("a", [1.0, 1.0]), ("", []), ("", None)])
def test_weights_that_do_not_fit_the_rewards(names, weights):
    with pytest.raises(ValueError, match="reward_weights"):
        RewardMix({name: Mean() for name in names}, weights)


def test_modules_are_moved():
    module = torch.nn.Linear(1, 1)
    assert RewardMix({"a": module, "b": Mean()}).to("meta") is not None
    assert module.weight.device.type == "meta"
