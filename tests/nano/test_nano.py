"""The embedded weights are what the model card says."""

import deform
import pretrain
import pretrain_judges
import pretrain_vae
import pytest
import torch

from rewards import load_reward, probe
from rlhf.generator.loading import load_pipeline
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
    assert min(pretrain.accuracy(verifier.model, real, drawn).values()) >= 0.9
    shown = pretrain.accuracy(verifier.model, rebuilt, drawn)
    assert min(shown[k] for k in ("color", "motion", "count")) >= 0.97, shown
    assert shown["shape"] >= 0.8, shown  # the VAE rounds small shapes


def test_the_verifier_is_not_fooled_by_a_wrong_caption(verifier, drawn, wrong):
    video = world.render(drawn)
    assert verifier(video, world.captions(drawn)).mean() > 0.95
    assert verifier(video, wrong).mean() < 0.02


@pytest.mark.parametrize("name", ["nano_preference", "nano_clip"])
def test_rewards_prefer_right_captions_and_have_a_gradient(name, drawn, wrong):
    reward, video, right = load_reward(name), world.render(drawn), world.captions(drawn)
    better = (reward(video, right) > reward(video, wrong)).float().mean()
    assert better > (0.95 if name == "nano_preference" else 0.75)  # a frame does not show which way a shape moves
    assert min(probe(reward, video_shape=(3, 17, 64, 64), prompts=right[:3]).grad_norms) > 0


def test_the_preference_model_prefers_clean_clips(drawn):
    reward, video, prompts = load_reward("nano_preference"), world.render(drawn), world.captions(drawn)
    for name, worse in {
        "grainy": (video + 0.35 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1),
        "washed out": video * 0.4 + 0.3,
    }.items():
        assert (reward(video, prompts) > reward(worse, prompts)).float().mean() > 0.9, name


def squares(pinch, verifier):
    """Large red squares whose edges are pulled in by a share of their radius, and their scores."""
    scenes = {k: torch.zeros(4, dtype=torch.long) for k in world.NUM_VALUES} | {k: torch.zeros(4) for k in "xy"}
    scenes |= {"shape": torch.ones(4, dtype=torch.long), "size": torch.ones(4, dtype=torch.long)}
    scenes["ground"] = torch.arange(4)
    chance = torch.zeros(4, deform.CHANCES)
    video = deform.draw("pinched", scenes, torch.full((4, 17), pinch / 0.5), chance)  # 0.5 of the radius at strength 1
    prompts = world.captions(scenes)
    return load_reward("nano_preference")(video, prompts).mean(), verifier(video, prompts).mean()


def test_a_pinched_square_is_no_square(verifier):
    scores = [squares(pinch, verifier) for pinch in (0, 0.15, 0.3, 0.5)]
    preference, right = zip(*scores, strict=True)
    assert list(preference) == sorted(preference, reverse=True)
    assert preference[0] - preference[2] > 0.05
    assert right[0] == 1
    assert right[2] <= 0.25
    assert right[3] == 0


@pytest.mark.parametrize("kind", deform.HELD_OUT)
def test_judges_rank_clips_by_their_deformation(kind, verifier):
    drawn = world.sample_scenes(6, torch.Generator().manual_seed(5), held_out=True)
    chance, prompts = torch.rand(6, deform.CHANCES, generator=torch.Generator().manual_seed(0)), world.captions(drawn)
    reward = load_reward("nano_preference")
    clips = [deform.draw(kind, drawn, torch.full((6, 17), strength), chance) for strength in (0.0, 0.5, 1.0)]
    whole, half, full = (reward(clip, prompts) for clip in clips)
    assert (whole > half).float().mean() > 0.6
    assert (half > full).float().mean() > 0.6
    assert verifier(clips[2], prompts).mean() < verifier(clips[0], prompts).mean() - (
        0.2 if kind == "stretched" else 0.5
    )


def test_an_empty_clip_is_none_of_these(verifier):
    logits = verifier.model(torch.full((1, 3, 17, 64, 64), 0.5))
    assert all(v.argmax(1).item() == world.NUM_VALUES[k] for k, v in logits.items())


@pytest.mark.slow
def test_the_base_is_right_less_than_half_the_time(pipe, verifier):
    prompts = world.held_out_prompts(256)
    generator = torch.Generator().manual_seed(0)
    scores = []
    for start in range(0, 256, 32):
        batch = prompts[start : start + 32]
        frames = pipe(batch, output_type="pt", generator=generator, **pipe.sampling.call_arguments()).frames
        scores.append(verifier(frames.transpose(1, 2), batch))
    assert 0.35 <= torch.cat(scores).mean().item() <= 0.55
