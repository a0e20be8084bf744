"""The search proposes settings that fit, and the dry run prints them."""

import dataclasses
import re

import pytest
from plans import tiny

from rlhf.checks import check_config
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.contentv.facts import TEXT_ENCODERS
from rlhf.planner.search import INEXACT_CHOICES, Planner
from rlhf.planner.text import format_fit, format_memory, format_sizes, format_time, plan_report

CONTEXT, DEVICE = 1000, "NVIDIA H200"
PIPE, ARGS, CARD = tiny(6, eval_prompts="none", num_frames=9, reward_funcs=["mine.py:Mine"], lora_rank=1)


@pytest.fixture(scope="module")
def planner():
    return Planner(ARGS, CARD)


@pytest.fixture(scope="module")
def limit(planner) -> int:
    """Bytes that the settings as they are do not fit into."""
    return planner.estimate().memory.peak_bytes * 2 // 3


@pytest.fixture(scope="module")
def fitting(planner, limit):
    return planner.find_fitting(limit)


def changed(processes: int = 1, **settings) -> Planner:
    return Planner(dataclasses.replace(ARGS, **settings), CARD, processes=processes)


def test_contentv_8b_is_described_without_weights():
    settings = {"reward_funcs": ["hps_v2_1"], "num_grad_steps": 5, "max_steps": 10, "height": 64, "width": 64}
    args = RewardGradientConfig(model="ByteDance/ContentV-8B", eval_prompts=None, device="cpu", **settings)
    text = plan_report(args)
    for fact in ("8,056,627,520 parameters, 15.01 GiB", "512", "num_inference_steps: 50", "(16, 32, 8, 8)"):
        assert fact in text
    assert "Time of a step: not estimated for" in text
    assert "A process on a CPU needs more" in text
    assert "It fits into" not in text, "a CPU has no memory of its own"
    known = plan_report(args, memory_limit_gib=64.0, device_name=DEVICE)
    assert "Time on NVIDIA H200, within 35%" in known
    assert "It fits into 64.00 GiB." in known
    assert "on a CPU" not in known


def test_tables_name_what_is_held_and_what_is_not_known(planner):
    assert "(16, 3, 4, 6)" in format_sizes(planner)
    estimate = planner.estimate()
    text = format_memory(planner, estimate, CONTEXT) + format_time(planner, estimate, DEVICE)
    for name in (*estimate.memory.held, *estimate.time, "Peak", DEVICE):
        assert name in text
    assert "Left out, as its cost is not known: mine.py:Mine" in text


@pytest.mark.parametrize(
    ("settings", "asked", "started", "expected"),
    [
        ({}, None, 1, r"processes, one a device +1\n.*all processes +2\n"),
        ({"guidance_parallel": 2}, None, 1, r"2 \(data 1 x guidance 2 x sequence 1\)"),
        ({"shard_base": True}, None, 1, r"2 \(data 2 x guidance 1 x sequence 1\)"),
        (
            {"guidance_parallel": 2, "gradient_accumulation_steps": 3},
            8,
            1,
            r"8 \(data 4 .*\n.*all.* +24\n",
        ),
        ({"sequence_parallel": 3}, None, 6, r"6 \(data 2 x guidance 1 x sequence 3\)"),
        ({}, 4, 6, r"4 \(data 4 x guidance 1 x sequence 1\)"),
    ],
)
def test_processes_are_those_asked_for_or_started_or_needed(settings, asked, started, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", str(started))
    PIPE.save_pretrained(tmp_path)
    monkeypatch.setattr("rlhf.planner.text.format_fit", lambda *_: "")
    args = dataclasses.replace(ARGS, model=str(tmp_path), device="cpu", **settings)
    assert re.search(expected, plan_report(args, processes=asked))


def test_a_sharded_base_is_proposed_for_several_processes(planner):
    several = changed(processes=4)
    assert {"shard_base": True} in several._combinations({})
    about_weights = {"shard_base", "stream_weights", "base_bits"}
    assert all(len(about_weights & {*c}) < 2 for c in several._combinations(INEXACT_CHOICES[-1]))
    assert not any("shard_base" in changes for changes in planner._combinations({}))
    sharded = changed(processes=4, shard_base=True)
    assert not any({"stream_weights", "base_bits"} & {*c} for c in sharded._combinations(INEXACT_CHOICES[-1]))


@pytest.mark.slow
def test_text_encoders_that_take_most_are_named(planner, monkeypatch):
    configs = {name: getattr(PIPE, name).config.to_dict() for name in TEXT_ENCODERS}
    assert Planner(ARGS, CARD, encoders=configs).encoder_bytes > 10**5
    assert planner.encoder_bytes == 0
    monkeypatch.setattr(planner, "encoder_bytes", 10**9)
    text = format_fit(planner, planner.estimate(), 10**6, CONTEXT, DEVICE)
    assert "more are needed for encoding prompts. No memory setting is enough" in text
    assert "are needed for encoding prompts. To fit, use rewards with fewer weights, or a device" in text


def test_proposals_fit_and_the_fastest_comes_first(planner, limit, fitting):
    assert len(fitting) > 1
    assert all(estimate.memory.peak_bytes <= limit for estimate in fitting)
    seconds = [estimate.step_seconds for estimate in fitting]
    assert seconds == sorted(seconds)
    for i, estimate in enumerate(fitting):
        assert not any(estimate.extends(other) for other in fitting[:i])
        assert not set(estimate.changes) & {name for choice in INEXACT_CHOICES for name in choice}
        assert planner.estimate(estimate.changes) == estimate
        check_config(RewardGradientConfig(eval_prompts="none", num_grad_steps=2, **estimate.changes))


def test_settings_of_the_run_are_not_proposed(limit, fitting):
    best = fitting[0]
    after = changed(**best.changes)
    assert after.estimate().memory == best.memory
    assert after.find_fitting(limit)[0].changes == {}


def test_the_verdict_in_words(planner):
    estimate = planner.estimate()
    peak = estimate.memory.peak_bytes
    verdict = lambda memory, device=DEVICE: format_fit(planner, estimate, memory, CONTEXT, device)
    assert verdict(peak + CONTEXT).startswith("It fits into ")
    too_small = verdict(peak * 2 // 3)
    assert "with the same gradient, fastest first:" in too_small
    assert re.search(r"^memory +one step +add.*\n-+\n\d.* m?s +--", too_small, re.MULTILINE)
    unknown = verdict(peak * 2 // 3, "a chip")
    assert "fastest first, as on an NVIDIA H200:" in unknown
    assert "one step" not in unknown
    hopeless = verdict(2 * CONTEXT)
    assert "No memory setting is enough: with all of them" in hopeless
    assert "To fit, lower per_device_train_batch_size, num_frames, or height and width; use rewards" in hopeless


@pytest.mark.slow  # CI runs it
def test_the_batch_size_to_lower_is_that_of_the_highest_phase():
    one = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    for settings, told in (
        (one, "num_frames"),
        (one | {"eval_prompts": "nano_held_out", "per_device_eval_batch_size": 8}, "per_device_eval_batch_size"),
    ):
        planner = changed(**settings)
        hopeless = format_fit(planner, planner.estimate(), 2 * CONTEXT, CONTEXT, DEVICE)
        assert f"To fit, lower {told}, " in hopeless


def test_a_changed_gradient_comes_last_and_is_said(planner):
    exact = min(planner.estimate(changes).memory.peak_bytes for changes in planner._combinations({}))
    inexact = min(planner.estimate(c).memory.peak_bytes for c in planner._combinations(INEXACT_CHOICES[1]))
    assert inexact < exact
    text = format_fit(planner, planner.estimate(), exact - 1 + CONTEXT, CONTEXT, DEVICE)
    assert "with another gradient (" in text
    assert "vae_dtype" in text


def test_a_window_of_all_frames_is_not_proposed(planner):
    assert any("decode_window" in changes for changes in planner._inexact_choices())
    short = list(changed(num_frames=5)._inexact_choices())
    assert {"vae_dtype": "bfloat16"} in short
    assert not any("decode_window" in changes for changes in short)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"memory_limit_gib": 0.0}, "memory_limit_gib: got 0.0, expected more than 0"),
        ({"device_name": "abacus"}, "plan_device: got 'abacus', expected one whose rates are known (NVIDIA H200, "),
        ({"processes": 0}, "plan_processes: got 0, expected at least 1"),
        ({"processes": 6}, "are 4 processes, which do not divide the 6 of this run"),
    ],
)
def test_a_flag_that_cannot_be_planned_for_is_an_error(flags, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_report(dataclasses.replace(ARGS, guidance_parallel=2, sequence_parallel=2), **flags)
