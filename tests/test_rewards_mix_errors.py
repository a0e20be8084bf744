"""What is wrong with rewards, or with what mixes them, names the reward, and the prompt where it is one's."""

import pytest
import torch
from test_rewards_mix import PROMPTS, Mean

from rewards import RewardError, RewardMix

VIDEO = torch.rand(2, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("scores", "got"),
    [
        (lambda video: video.mean(), r"shape \(\)"),
        (lambda video: video.mean(dim=(1, 3, 4)), r"shape \(2, 5\)"),
        (lambda video: video.mean(dim=(1, 2, 3, 4)) / torch.tensor([1.0, 0.0]), "inf for prompt 'a blue square'"),
        (lambda video: video.sum(dim=(1, 2, 3, 4)).long(), "torch.int64"),
        (lambda video: [0.0, 0.0], "a list"),
    ],
)
def test_bad_scores_name_the_reward(scores, got):
    with pytest.raises(RewardError, match=got) as caught:
        RewardMix({"fine": Mean(), "broken": lambda video, prompts, **info: scores(video)})(VIDEO, PROMPTS)
    assert "'broken'" in str(caught.value)


def test_a_model_that_has_diverged_is_told_from_a_reward_that_breaks():
    pixels = VIDEO.clone()
    pixels[1] *= torch.nan
    with pytest.raises(RewardError, match="nan for prompt 'a blue square', and pixels that are no numbers.*diverged"):
        RewardMix({"fine": Mean()})(pixels, PROMPTS)
    with pytest.raises(RewardError, match=r"nan for prompt 'a red circle'; .*division by zero"):
        RewardMix({"broken": lambda video, prompts, **info: Mean()(video, prompts) * torch.nan})(pixels, PROMPTS)


@pytest.mark.parametrize(("names", "weights"), [("ab", [1.0]), ("a", [1.0, 1.0]), ("", []), ("", None)])
def test_weights_that_do_not_fit_the_rewards(names, weights):
    with pytest.raises(ValueError, match="reward_weights"):
        RewardMix({name: Mean() for name in names}, weights)


def test_limits_that_do_not_fit_the_rewards():
    for key in ("caps", "targets"):
        with pytest.raises(ValueError, match=f"{key}: got 'flikcer', expected one of flicker"):
            RewardMix({"flicker": Mean()}, **{key: {"flikcer": 0.9}})
    with pytest.raises(ValueError, match="caps: got nan for 'flicker', expected a finite number"):
        RewardMix({"flicker": Mean()}, caps={"flicker": float("nan")})
    with pytest.raises(ValueError, match="got flicker in both, expected each in one"):
        RewardMix({"flicker": Mean()}, caps={"flicker": 0.9}, targets={"flicker": 0.8})


def test_what_a_reward_raises_names_it_and_the_prompts():
    def fragile(video, prompts, **info):
        raise KeyError("no such word")

    with pytest.raises(
        RewardError,
        match=r"'fragile': got KeyError: 'no such word' for the prompts \['a cat'\] \(.*_mix_errors.py, line \d+\)",
    ) as caught:
        RewardMix({"fragile": fragile})(torch.rand(1, 3, 1, 8, 8), ["a cat"])
    assert isinstance(caught.value.__cause__, KeyError)

    def hungry(video, prompts, **info):
        raise torch.OutOfMemoryError("as an accelerator says it")

    with pytest.raises(torch.OutOfMemoryError):  # which has cures of its own
        RewardMix({"hungry": hungry})(torch.rand(1, 3, 1, 8, 8), ["a cat"])
