"""Seconds of a step: how often parts run, and what a device's rates make of them."""

import dataclasses
from collections import Counter

import pytest
from conftest import PROMPTS, redness
from test_parts import CHECKPOINTED, tiny
from tiny import tiny_pipeline

from rlhf.memory_plan import plan_rewards
from rlhf.parts import Parts
from rlhf.rates import Rates
from rlhf.time_plan import Calls, count_calls, plan_time, reward_seconds, seconds
from rlhf.trace import Operation, Phase
from rlhf.trainer import RewardGradientTrainer

RATES = Rates("any", {"matrix float32": 1e9, "conv float32": 5e8}, 1e9, 1e-3, 1e-4, 1e8)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_grad_steps": 3},
        {"method": "draft_lv", "method_kwargs": {"num_draws": 3}},
        {"method": "srpo", "method_kwargs": {"num_draws": 2}, "drift_weight": 1.0},
        {"method": "listed", "method_kwargs": {"steps": [0, 2]}, "guidance_gradient": "text"},
        {"method": "drtune", "num_grad_steps": 2, "guidance_gradient": "none"},
        {"num_grad_steps": 2, "guidance_gradient": "distill", "drift_weight": 1.0},
        {"method": "refl", "method_kwargs": {"jump_steps": 1}, "guidance_scale": 1.0},
        {"num_inference_steps": 6, "prefix_steps": 3},
        {"num_inference_steps": 6, "guidance_every": 2},
    ],
)
def test_calls_are_those_that_a_training_step_makes(make_args, settings):
    pipe, args = tiny_pipeline(), make_args(per_device_train_batch_size=1, max_steps=1, **settings)
    trainer = RewardGradientTrainer(pipe, redness, args, PROMPTS)
    calls = []
    pipe.transformer.register_forward_hook(lambda module, inputs, output: calls.append(output[0].requires_grad))
    trainer._begin()
    trainer.step(0)
    found = count_calls(trainer.args)
    assert (len(calls), sum(calls)) == (found.prefix + found.constant + found.with_gradient, found.with_gradient)


def test_steps_that_are_listed_take_what_the_last_steps_take():
    """Wherever a step's input has a gradient, and nowhere else: DRTune detaches it."""
    plans = {}
    for method in (
        {"num_grad_steps": 2},
        {"method": "listed", "method_kwargs": {"steps": [2, 3]}},
        {"method": "drtune"},
    ):
        _, args, card = tiny(
            num_inference_steps=4, **{"num_grad_steps": 1 if "method_kwargs" in method else 2} | method
        )
        parts = Parts(args, card)
        plans[args.method] = plan_time(parts, args, plan_rewards(parts, args), RATES).parts["gradient segment"]
    assert plans["listed"] == plans["draft_k"] > plans["drtune"]


def test_a_rollout_used_again_is_paid_once():
    _, args, _ = tiny(num_inference_steps=10, num_grad_steps=1, rollout_reuse=3)
    assert count_calls(args) == Calls(prefix=2 * 9 / 3, constant=0, with_gradient=2)


def test_seconds_by_hand():
    work = Counter(
        {
            Operation("matrix", "float32", 4_000_000, 1000): 2,  # 4 ms of products each
            Operation("conv", "float32", 1_000_000, 5_000_000): 1,  # 2 ms of products, 5 ms of traffic
            Operation("other", "float32", 0, 3_000_000): 1,  # 3 ms
            Operation("attention", "bfloat16", 1_000_000, 0): 1,  # not measured: as products, 1 ms
        }
    )
    phase = Phase(0, work=work, calls=5, calls_of_autograd=10)
    assert seconds(phase, RATES) == pytest.approx(0.017)
    phase.calls = 20
    assert seconds(phase, RATES) == pytest.approx(0.0315), "20 calls of 1 ms, 10 of 0.1, half as much around them"
    assert seconds(phase, dataclasses.replace(RATES, waits=True)) == pytest.approx(0.038)
    phase = Phase(0, work=Counter({Operation("exchange", "float32", 0, 10**8): 2}))
    assert seconds(phase, RATES) == 2, "as to the host, where it was not measured"
    assert seconds(phase, dataclasses.replace(RATES, between=4e8)) == 0.5


def test_settings_cost_what_they_do():
    _, given, card = tiny(num_frames=17)
    given.reward_funcs = ["flicker"]
    parts = Parts(given, card)
    rates = dataclasses.replace(RATES, flops=RATES.flops | {"attention float32": 1e6}, call_seconds=0)

    def plan(**settings):
        args = dataclasses.replace(given, **settings)
        return plan_time(parts, args, plan_rewards(parts, args), rates).parts

    plain, segment = plan(), "gradient segment"
    assert plan(gradient_accumulation_steps=2)["sampling"] == pytest.approx(2 * plain["sampling"])
    assert plan(**CHECKPOINTED)[segment] > plan(**CHECKPOINTED, keep_attention=True)[segment] > plain[segment]
    assert plan(stepwise_backward=True)[segment] > plain[segment]
    assert plan(num_inference_steps=22)["sampling"] == pytest.approx(10 * plain["sampling"])  # of 4, two are the window
    assert plan(decode_chunk=1, decode_checkpoint=True)["decoding and back"] > plain["decoding and back"]
    assert plan(decode_window=5)["decoding and back"] < plain["decoding and back"]
    assert plan(method_kwargs={"relative_words": ["good", "bad"]})["reward and back"] == 2 * plain["reward and back"]
    slow = dataclasses.replace(RATES, link=1.0)
    _, args, card = tiny(**CHECKPOINTED, stream_weights=True)
    parts = Parts(args, card)
    weights = parts.frozen[0] * 4
    assert plan_time(parts, args, plan_rewards(parts, args), slow).parts["sampling"] == pytest.approx(4 * weights)


def test_the_split_of_guidance_halves_the_calls_and_nothing_else_does():
    _, args, _ = tiny(num_inference_steps=10, num_grad_steps=3)
    alone, split = count_calls(args), count_calls(dataclasses.replace(args, guidance_parallel=2))
    assert (alone.prefix, alone.with_gradient) == (2 * split.prefix, 2 * split.with_gradient) == (14, 6)
    assert count_calls(dataclasses.replace(args, sequence_parallel=2, shard_base=True)) == alone
    drifting = dataclasses.replace(args, drift_weight=1.0, guidance_parallel=2)
    assert count_calls(drifting) == Calls(prefix=7, constant=1, with_gradient=4)


def test_what_travels_between_processes_takes_time():
    """A sum twice round the ring, a base that the others hold half of, and tokens for heads."""
    pipe, args, card = tiny(num_frames=9, **CHECKPOINTED)
    rates = dataclasses.replace(RATES, flops={"matrix float32": 1e20}, bytes=1e20, call_seconds=0, autograd_seconds=0)
    rates = dataclasses.replace(rates, between=1.0)
    args.reward_funcs = ["flicker"]

    def plan(processes, **settings):
        changed = dataclasses.replace(args, **settings)
        parts = Parts(changed, card, processes)
        return parts, plan_time(parts, changed, plan_rewards(parts, changed), rates).parts

    parts, times = plan(4)
    assert times["optimizer"] == pytest.approx(2 * 4 * parts.trained * 3 / 4)
    assert times["sampling"] < 1e-6
    parts, times = plan(2, shard_base=True)
    calls = count_calls(args)
    assert times["sampling"] == pytest.approx(calls.prefix * 4 * parts.frozen[0] / 2)
    assert times["gradient segment"] == pytest.approx(2 * calls.with_gradient * 4 * parts.frozen[0] / 2)
    parts, times = plan(2, sequence_parallel=2)
    config, text = pipe.transformer.config, card["tokenizer"]["model_max_length"] + args.max_sequence_length
    own, width = parts.tokens // 2, config.num_attention_heads * config.attention_head_dim
    of_block = 2 * width * (3 * own + own + text)  # queries, keys, values; results; the text's results, from all
    of_result = 2 * parts.tokens * config.patch_size**2 * config.out_channels
    assert times["sampling"] == pytest.approx(calls.prefix * 4 * (config.num_layers * of_block + of_result) / 2)
    assert times["gradient segment"] > 3 * times["sampling"], "there, again, and back"


def test_rewards_are_slower_where_products_are(monkeypatch):
    known = {"flops": {"matrix float32": 4e9}, "bytes": 1e9, "call_seconds": 0, "autograd_seconds": 0, "link": None}
    monkeypatch.setitem(__import__("rlhf.measured").measured.RATES, "NVIDIA H200", known)
    _, args, card = tiny(reward_funcs=["hps_v2_1"])
    rewards = plan_rewards(Parts(args, card), args)
    assert rewards.seconds > 0
    assert reward_seconds(rewards, RATES) == pytest.approx(4 * rewards.seconds)
