"""One video at a time: the same with parts of the model in host memory, chosen by predicted memory."""

import re
from pathlib import Path

import pytest
import torch
from adapted_model import save_tiny_model
from tiny import SAMPLING

from rlhf.adapter.lora_file import read_lora
from rlhf.evaluation.generate import sample
from rlhf.evaluation.sampler import Placement, Sampler
from rlhf.evaluation.video_set import Video
from rlhf.generator.files import SamplingDefaults, model_sizes
from rlhf.generator.registry import CONTENTV_8B
from rlhf.planner.sampling import GIB, PLACEMENTS, choose_plan, fit_sampling, plan_sampling
from rlhf.planner.text_encoders import encoder_configs
from rlhf.planner.time import H200

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def videos(saved, placement) -> list[torch.Tensor]:
    """The base, an adapter put on a model that has run, half of it, another prompt, the base again."""
    sampler, lora = Sampler(str(saved / "base"), CPU, placement), read_lora(saved / "adapter")
    found = [sampler.sample("a star", 1, SAMPLING)]
    for scale in (1.0, 0.5):
        sampler.use(lora, scale)
        found.append(sampler.sample("a star", 1, SAMPLING))
    found.append(sampler.sample("rain", 1, SAMPLING))
    sampler.use(None)
    return [*found, sampler.sample("a star", 1, SAMPLING)]


def test_every_placement_makes_the_same_videos(saved):
    whole = videos(saved, Placement())
    assert torch.equal(whole[0], whole[-1])
    assert min((a.int() - b.int()).abs().float().mean() for a, b in zip(whole, whole[1:], strict=False)) > 1
    for placement in PLACEMENTS[1:]:
        for video, expected in zip(videos(saved, placement), whole, strict=True):
            assert (video.int() - expected.int()).abs().max() <= 1, placement  # rounding


def test_a_video_that_is_no_number_is_refused(saved):
    """As of an adapter that overflows; it became black frames."""
    sampler = Sampler(str(saved / "base"), CPU)
    sampler.pipe.transformer.proj_out.bias.data[0] = torch.nan
    makes = [
        lambda: sampler.sample("a star", 1, SAMPLING),
        lambda: sample(sampler.pipe, [Video(saved / "a.mp4", "a star", 1)], SAMPLING),
    ]
    for make in makes:
        with pytest.raises(ValueError, match="got a video with NaN or infinite pixels, expected .*; use a smaller"):
            make()


def test_encoders_in_turn_come_to_the_device_one_after_another_and_leave_no_copy(saved, monkeypatch):
    sampler, visits = Sampler(str(saved / "base"), CPU, Placement("in turn", True)), []
    names = sampler.pipe.family.text_encoders
    places = lambda: {n: [p.data_ptr() for p in getattr(sampler.pipe, n).parameters()] for n in names}
    home, encode = places(), sampler.pipe.encode_part

    def note(name, *args):
        visits.append((name, [n for n, place in places().items() if not {*place} & {*home[n]}]))
        return encode(name, *args)

    sampler.device = torch.device("cpu", 0)  # stands for an accelerator: what moves there is copied
    monkeypatch.setattr(sampler.pipe, "encode_part", note)
    sampler._encode("a star", SAMPLING)
    assert visits == [(name, [name]) for name in names]
    assert places() == home


def test_progress_is_told_and_can_end_the_sampling(saved):
    sampler, seen = Sampler(str(saved / "base"), CPU), []
    sampler.sample("a star", 1, SAMPLING, seen.append)
    assert seen == [0, 1, 2, 3, 4]

    def stop(done):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.sample("a star", 1, SAMPLING, stop)


@pytest.fixture(scope="module")
def plans():
    card = model_sizes(CONTENTV_8B)
    return plan_sampling(CONTENTV_8B, card, encoder_configs(CONTENTV_8B), SamplingDefaults(), GIB // 2)


def test_the_planner_chooses_the_fastest_placement_that_fits(plans):
    chosen = {limit: choose_plan(plans, limit).placement for limit in (80, 26, 16, 12)}
    assert chosen == {80: Placement(), 26: Placement("in turn"), 16: PLACEMENTS[2], 12: PLACEMENTS[2]}
    first, *_, last = plans
    # Weights as published: 16.0e9 bytes of the transformer, 9.5e9 and 1.7e9 of T5 and both CLIPs.
    assert first.phases["denoising"] > (16.0e9 + 9.5e9 + 1.7e9)
    assert last.phases["encoding"] < 2 * GIB
    with pytest.raises(ValueError, match=r"got 4, expected at least 1\d(\.\d)? for decoding .* raise it, or lower"):
        choose_plan(plans, 4)
    for wrong in (0, float("nan")):
        with pytest.raises(ValueError, match="expected more than 0"):
            choose_plan(plans, wrong)


def test_the_guide_has_the_planners_figures():
    plans = plan_sampling(
        CONTENTV_8B, model_sizes(CONTENTV_8B), encoder_configs(CONTENTV_8B), SamplingDefaults(), H200.context_bytes
    )
    guide = (Path(__file__).parents[2] / "docs" / "demo.md").read_text()
    rows = re.findall(r"\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|\n", guide)
    assert rows == [tuple(f"{size / GIB:.1f}" for size in plan.phases.values()) for plan in plans]
    assert f"{H200.context_bytes / GIB:.2f} for CUDA's context" in guide


def test_without_a_limit_nothing_is_planned():
    assert fit_sampling("nowhere", {}, SamplingDefaults(), CPU, None) is None
