"""What the dry run prints is worked out; what it proposes fits."""

import dataclasses
import re

import pytest
from test_parts import tiny

from rlhf.checks import check_config
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.encoders import PUBLISHED
from rlhf.planner import NOT_EXACT, Planner, describe, needs, sizes, verdict
from rlhf.rates import Rates

RATES = Rates("a chip", {"matrix float32": 1e12}, 1e12, 1e-6, 1e-6, 1e10, beside=1000)


SMALL = tiny(
    eval_prompts="none", num_frames=9, reward_funcs=["mine.py:Mine"], lora_rank=1
)  # nothing of the reward is known


@pytest.fixture(scope="module")
def planner():
    return Planner(*SMALL[1:], RATES)


def test_contentv_8b_is_described_without_weights(monkeypatch):
    settings = {"reward_funcs": ["hps_v2_1"], "num_grad_steps": 5, "max_steps": 10, "height": 64, "width": 64}
    text = describe(RewardGradientConfig(model="ByteDance/ContentV-8B", eval_prompts=None, device="cpu", **settings))
    for fact in ("8,056,627,520 parameters, 15.01 GiB", "512", "num_inference_steps: 50", "(16, 32, 8, 8)"):
        assert fact in text
    assert "predicted, not measured" in text
    assert "measured now" in text
    assert "fit" not in text, "a CPU has no memory of its own"


def test_sizes_and_needs_name_what_is_held_and_what_is_not_known(planner):
    assert "(16, 3, 4, 6)" in sizes(planner)
    text = needs(planner, planner.plan(), "made up")
    for name in (*planner.plan().memory.held, *planner.plan().time.parts, "at most", "a chip (made up)"):
        assert name in text
    assert "Not known, and left out: mine.py:Mine." in text


def test_a_process_of_a_layout_is_planned(monkeypatch):
    """As many processes as are asked for, were started, or are needed at least."""

    def planned(**settings) -> str:
        return sizes(Planner(dataclasses.replace(SMALL[1], **settings), SMALL[2], RATES))

    assert re.search(r"processes, one a device +1\n.*all +2\n", planned())
    assert "2 (data 1 x guidance 2 x sequence 1)" in planned(guidance_parallel=2)
    assert "2 (data 2 x guidance 1 x sequence 1)" in planned(shard_base=True)
    asked = planned(guidance_parallel=2, plan_processes=8, gradient_accumulation_steps=3)
    assert re.search(r"8 \(data 4 x guidance 2 x sequence 1\)\n.*all +24\n", asked)
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert "6 (data 2 x guidance 1 x sequence 3)" in planned(sequence_parallel=3)
    assert "4 (data 4 x guidance 1 x sequence 1)" in planned(plan_processes=4)


def test_a_sharded_base_is_proposed_where_there_are_several_processes(planner):
    four = Planner(dataclasses.replace(SMALL[1], plan_processes=4), SMALL[2], RATES)
    assert {"shard_base": True} in four._changes({})
    assert all(len({"shard_base", "stream_weights", "base_bits"} & {*c}) < 2 for c in four._changes(NOT_EXACT[-1]))
    assert not any("shard_base" in changes for changes in planner._changes({}))
    sharded = Planner(dataclasses.replace(SMALL[1], shard_base=True), SMALL[2], RATES)
    assert not any("stream_weights" in changes or "base_bits" in changes for changes in sharded._changes(NOT_EXACT[-1]))


@pytest.mark.slow
def test_text_encoders_that_take_most_are_named(planner, monkeypatch):
    configs = {name: getattr(SMALL[0], name).config.to_dict() for name in PUBLISHED}
    assert Planner(*SMALL[1:], RATES, configs).encoding > 10**5
    assert planner.encoding == 0
    monkeypatch.setattr(planner, "encoding", 10**9)
    text = verdict(planner, planner.plan(), 10**6)
    assert "are missing (encoding prompts). None of" in text
    assert "are needed (encoding prompts). Take rewards of fewer weights, or a device" in text


def test_proposals_fit_and_are_in_the_order_of_time(planner):
    plain = planner.plan()
    limit = plain.memory.most * 2 // 3
    plans = planner.fitting(limit)
    assert len(plans) > 1
    assert all(plan.memory.most <= limit for plan in plans)
    times = [plan.time.total for plan in plans]
    assert times == sorted(times)
    for i, plan in enumerate(plans):
        assert not any(other.changes.items() <= plan.changes.items() for other in plans[:i])
        assert not set(plan.changes) & {name for changes in NOT_EXACT for name in changes}
        assert planner.plan(plan.changes) == plan
        check_config(RewardGradientConfig(eval_prompts="none", num_grad_steps=2, **plan.changes))


def test_what_the_settings_have_already_is_not_proposed(planner):
    limit = planner.plan().memory.most * 2 // 3
    best = planner.fitting(limit)[0].changes
    changed = Planner(dataclasses.replace(SMALL[1], **best), SMALL[2], RATES)
    assert changed.plan().memory == planner.fitting(limit)[0].memory
    assert changed.fitting(limit)[0].changes == {}


def test_in_words(planner):
    plan = planner.plan()
    most = plan.memory.most
    assert verdict(planner, plan, most + 1000).startswith("It fits into ")
    too_small = verdict(planner, plan, most * 2 // 3)
    assert "at the same gradient, fastest first:\n  --" in too_small
    assert "s a step" in too_small
    nothing_helps = verdict(planner, plan, 2000)
    assert "None of the settings about memory is enough: with all of them" in nothing_helps
    assert "Lower num_frames" in nothing_helps


def test_what_changes_the_gradient_comes_last_and_is_said(planner):
    exact = min(planner.plan(changes).memory.most for changes in planner._changes({}))
    inexact = min(planner.plan(changes).memory.most for changes in planner._changes(NOT_EXACT[1]))
    assert inexact < exact
    text = verdict(planner, planner.plan(), exact - 1 + RATES.beside)
    assert "not at the same gradient (" in text
    assert "vae_dtype" in text


def test_a_window_of_all_frames_is_not_proposed(planner):
    assert any("decode_window" in changes for changes in planner._tried())
    short = Planner(dataclasses.replace(SMALL[1], num_frames=5), SMALL[2], RATES)
    assert {"vae_dtype": "bfloat16"} in short._tried()
    assert not any("decode_window" in changes for changes in short._tried())


def test_what_cannot_be_planned_for_is_said():
    settings = {"plan_processes": 6, "guidance_parallel": 2, "sequence_parallel": 2, "dry_run": True}
    with pytest.raises(ConfigError) as error:
        check_config(RewardGradientConfig(memory_limit_gib=0.0, plan_device="abacus", **settings))
    assert "memory_limit_gib: got 0.0" in str(error.value)
    assert "are 4 processes, which do not divide the 6 of this run" in str(error.value)
    assert "plan_device: got 'abacus', expected one of those measured" in str(error.value)


def test_memory_that_is_asked_for_is_planned_for():
    settings = {"memory_limit_gib": 64.0, "device": "cpu", "eval_prompts": None, "per_device_train_batch_size": 1}
    assert "It fits into 64.00 GiB." in describe(RewardGradientConfig(**settings))
