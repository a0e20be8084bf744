"""The embedded weights are what the model card says."""

import pretrain
import pretrain_judges
import pretrain_vae
import pytest
import torch

from rewards import load_reward, probe
from rlhf.contentv.loading import load_pipeline
from rlhf.nano import world
from rlhf.nano.rewards import WEIGHTS


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("nano")


@pytest.fixture(scope="module")
def verifier():
    return load_reward("nano_verifier")


@pytest.fixture(scope="module")
def drawn():
    return world.sample_scenes(64, torch.Generator().manual_seed(11), held_out=True)


@pytest.fixture(scope="module")
def wrong(drawn):
    """Captions of the scenes with one wrong attribute each."""
    return world.captions(pretrain_judges.corrupt_one_attribute(drawn, torch.Generator().manual_seed(0)))


def test_all_weights_together_stay_under_32_megabytes():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) < 32e6


def test_the_verifier_reads_renders_and_reconstructions(pipe, verifier):
    drawn = world.sample_scenes(24, torch.Generator().manual_seed(0), held_out=True)
    real = world.render(drawn)
    rebuilt = torch.cat([pretrain_vae.reconstruct(pipe.vae, clips) for clips in real.split(12)])
    assert min(pretrain.accuracy(verifier.model, real, drawn).values()) >= 0.99
    shown = pretrain.accuracy(verifier.model, rebuilt, drawn)
    assert min(shown[k] for k in world.JUDGED) >= 0.97, shown


def test_the_verifier_is_not_fooled_by_a_wrong_caption(verifier, drawn, wrong):
    video = world.render(drawn)
    assert verifier(video, world.captions(drawn)).mean() > 0.98
    assert verifier(video, wrong).mean() < 0.02


@pytest.mark.parametrize("name", ["nano_preference", "nano_clip"])
def test_rewards_prefer_right_captions_and_have_a_gradient(name, drawn, wrong):
    reward, video, right = load_reward(name), world.render(drawn), world.captions(drawn)
    better = (reward(video, right) > reward(video, wrong)).float().mean()
    assert better > (0.95 if name == "nano_preference" else 0.75)  # a frame does not show which way a shape moves
    assert min(probe(reward, video_shape=(3, 17, 64, 64), prompts=right[:3]).grad_norms) > 0


def test_the_preference_model_prefers_clean_clips(drawn):
    reward, video, prompts = load_reward("nano_preference"), world.render(drawn), world.captions(drawn)
    other = (drawn["shape"] + 1) % len(world.SHAPES)
    for name, worse in {
        "grainy": (video + 0.35 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1),
        "washed out": video * 0.4 + 0.3,
        "badly drawn": world.render(drawn, melt=(other, torch.full((64,), 0.5))),
    }.items():
        assert (reward(video, prompts) > reward(worse, prompts)).float().mean() > 0.9, name


@pytest.mark.slow
def test_the_base_is_right_half_the_time_but_not_always(pipe, verifier):
    prompts = world.held_out_prompts(256)
    generator = torch.Generator().manual_seed(0)
    scores = []
    for start in range(0, 256, 32):
        batch = prompts[start : start + 32]
        frames = pipe(batch, output_type="pt", generator=generator, **pipe.sampling.call_arguments()).frames
        scores.append(verifier(frames.transpose(1, 2), batch))
    assert 0.5 <= torch.cat(scores).mean().item() <= 0.85
