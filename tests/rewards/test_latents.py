"""Rewards of space "latents": what they are given, beside rewards of pixels, and where there are none."""

import pytest
import torch

from rewards import RewardError, RewardMix, frames_needed, load_reward, probe
from rewards.check import main as check
from rewards.contract import NoisyLatents
from rewards.placement import OnDevice
from rewards.score import load_rewards
from rewards.serve import RewardServer
from rlhf.generator.files import latent_sizes, model_sizes

PROMPTS, SHAPE = ["a red circle", "a blue square"], (3, 9, 32, 48)
SOURCE = """
class Quiet:
    space, std = "latents", 2.0

    def __call__(self, latents, prompts, *, sigma, text, pooled):
        assert latents.shape[1:] == (16, 3, 4, 6), latents.shape
        assert text.shape[0] == pooled.shape[0] == len(latents) and 0 <= sigma <= 1
        return -(1 - sigma) * latents.square().mean((1, 2, 3, 4)) + text.mean((1, 2)) + pooled.sum(1)
"""


@pytest.fixture
def quiet(tmp_path):
    (tmp_path / "quiet.py").write_text(SOURCE)
    return f"{tmp_path}/quiet.py:Quiet"


def noisy(sigma=0.25):
    generator = torch.Generator().manual_seed(0)
    x, text, pooled = (torch.randn(2, *s, generator=generator) for s in ((16, 3, 4, 6), (5, 8), (8,)))
    return NoisyLatents(x.requires_grad_(), sigma, text, pooled)


def test_the_probe_gives_latents_of_the_generators_size_with_text(quiet):
    reward = load_reward(quiet)
    for sizes in (
        None,
        latent_sizes(model_sizes("nano")),
        latent_sizes(model_sizes("Wan-AI/Wan2.1-T2V-14B-Diffusers")),
    ):
        report = probe(reward, SHAPE, latents=sizes)
        assert report.frames == 0
        assert min(report.grad_norms) > 0
    detached = lambda latents, prompts, **info: latents.detach().mean((1, 2, 3, 4))
    detached.space = "latents"
    with pytest.raises(RewardError, match="no gradient at the latents"):
        probe(detached, SHAPE)


def test_the_check_says_what_a_reward_of_latents_is_given(quiet, capsys):
    assert check([quiet, "--shape", "3,9,32,48", "--model", "nano"]) == 0
    printed = capsys.readouterr().out
    assert "space='latents', nothing is decoded for it" in printed
    assert "not zero at the latents" in printed
    assert check([quiet, "--model", "no/where/at/all"]) == 1
    assert "correct the name or the path" in capsys.readouterr().out


def test_a_mix_gives_each_reward_its_input_and_sums_their_gradients(quiet):
    given, video = noisy(), torch.rand(2, 3, 5, 8, 8).requires_grad_()
    bright = lambda video, prompts, **info: video.mean((1, 2, 3, 4)) if set(info) == {"rows", "fps"} else None
    mix = RewardMix({"quiet": load_reward(quiet), "bright": bright}, [2.0, 3.0])
    total, raw = mix(video, PROMPTS, given, fps=8)
    x = given.latents_BCTHW
    expected = -0.75 * x.square().mean((1, 2, 3, 4)) + given.text_BLD.mean((1, 2)) + given.pooled_BP.sum(1)
    torch.testing.assert_close(raw["quiet"], expected.detach())
    torch.testing.assert_close(total, 2 * expected / 2.0 + 3 * video.mean((1, 2, 3, 4)))
    at_latents, at_pixels = torch.autograd.grad(total.sum(), (x, video))
    torch.testing.assert_close(at_latents, -0.75 * 2 * x.detach() / x[0].numel())
    torch.testing.assert_close(at_pixels, torch.full_like(video, 3 / video[0].numel()))
    assert (frames_needed(mix.rewards["quiet"], 9), mix.latent_rewards) == (0, ["quiet"])
    alone = RewardMix({"quiet": load_reward(quiet)})
    torch.testing.assert_close(alone(None, PROMPTS, given, fps=8)[0], expected / 2.0)
    torch.testing.assert_close(alone.start(None, PROMPTS, given, fps=8)()[0], (expected / 2.0).detach())
    moved = OnDevice("quiet", load_reward(quiet), "cpu")
    assert torch.equal(RewardMix({"quiet": moved})(None, PROMPTS, given, fps=8)[1]["quiet"], raw["quiet"])


def test_where_there_are_only_videos_a_reward_of_latents_is_refused(quiet):
    with pytest.raises(RewardError, match="got decoded videos alone; expected their latents"):
        RewardMix({"quiet": load_reward(quiet)})(torch.rand(2, 3, 5, 8, 8), PROMPTS)
    with pytest.raises(RewardError, match="space 'latents'.*Score with it in a run"):
        load_rewards([quiet], {})
    with pytest.raises(RewardError, match="space 'latents'.*Give it to the run itself"):
        RewardServer(load_reward(quiet), "quiet", ("127.0.0.1", 0))
