"""Seconds of a step: how often each call runs, times its work at a device's rates."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
from plans import CHECKPOINTED, tiny
from real_videos import write_videos
from scripts import ROOT
from tiny import tiny_pipeline
from toy_rewards import PROMPTS, calm, redness

from rlhf.planner.memory import plan_rewards
from rlhf.planner.time import H200, RATES, CallCounts, Rates, count_calls, phase_seconds, plan_time
from rlhf.planner.traced import TracedModel
from rlhf.planner.tracer import Operation, Phase
from rlhf.trainer import RewardGradientTrainer

FLOPS = {"matrix float32": 1e9, "conv float32": 5e8}
SLOW = Rates(FLOPS, memory_bandwidth=1e9, host_bandwidth=1e8, peer_bandwidth=4e8, context_bytes=0, launch_seconds=1e-3)


def test_the_rates_are_those_that_were_measured():
    rows = json.loads((ROOT / "bench" / "results" / "planner.json").read_text())["rows"]
    measured = next(row["rates"] for row in rows if row["arm"] == "rates")
    assert measured["device"] == "NVIDIA H200"
    assert {name: measured["flops"][name] for name in H200.flops} == pytest.approx(H200.flops, rel=1e-3)
    for name in ("memory_bandwidth", "host_bandwidth", "peer_bandwidth", "context_bytes"):
        assert measured[name] == pytest.approx(getattr(RATES["NVIDIA H200"], name), rel=1e-3)


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
        {"method": "leap_align", "drift_weight": 1.0},
        {"method_kwargs": {"negative_drift_weight": 1.0}},
        {"method_kwargs": {"negative_drift_weight": 1.0}, "guidance_together": True},
        {"method": "prfl", "method_kwargs": {"drawn_steps": 1}},
        {"method": "adjoint_matching"},
        {"method": "flow_grpo", "per_device_train_batch_size": 2, "method_kwargs": {"group_size": 2}},
        {
            "method": "flow_grpo",
            "per_device_train_batch_size": 2,
            "method_kwargs": {"group_size": 2, "kl_weight": 0.1},
            "guidance_gradient": "text",
        },
        {"method": "adjoint_matching", "method_kwargs": {"adjoint_steps": 2}},
        {"num_inference_steps": 6, "prefix_steps": 3},
    ],
)
def test_calls_are_those_that_a_training_step_makes(make_args, settings):
    pipe, args = tiny_pipeline(), make_args(**{"per_device_train_batch_size": 1, "max_steps": 1} | settings)
    trainer = RewardGradientTrainer(pipe, [redness, calm] if args.method == "prfl" else redness, args, PROMPTS)
    calls, batch = [], args.per_device_train_batch_size
    pipe.transformer.register_forward_hook(  # both branches may be one batch
        lambda module, inputs, output: calls.extend([output[0].requires_grad] * (len(output[0]) // batch))
    )
    trainer._begin()
    trainer.step(0)
    found = count_calls(trainer.args)
    assert (len(calls), sum(calls)) == (found.prefix + found.constant + found.with_gradient, found.with_gradient)


def test_an_offline_step_makes_the_calls_of_its_draws_and_of_the_loss_on_videos(make_args, tmp_path, monkeypatch):
    monkeypatch.setenv("CONTENTV_RLHF_CACHE", str(tmp_path / "cache"))
    options = {"offline": True, "anchor_data_steps": 1}
    args = make_args(method="srpo", method_kwargs=options, anchor_data=str(write_videos(tmp_path / "videos")))
    trainer, calls = RewardGradientTrainer(tiny_pipeline(), redness, args), []
    trainer.pipe.transformer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.step(0)
    assert calls == [True] * 5
    assert count_calls(trainer.args) == CallCounts(prefix=0, constant=0, with_gradient=5)


def test_guidance_parallel_halves_the_calls_and_reuse_the_prefix():
    _, args, _ = tiny(num_inference_steps=10, num_grad_steps=3)
    counts = lambda **settings: count_calls(dataclasses.replace(args, **settings))
    assert counts() == CallCounts(prefix=14, constant=0, with_gradient=6)
    assert counts(guidance_parallel=2) == CallCounts(prefix=7, constant=0, with_gradient=3)
    assert counts(sequence_parallel=2, shard_base=True) == counts()
    assert counts(drift_weight=1.0, guidance_parallel=2) == CallCounts(prefix=7, constant=1, with_gradient=4)
    assert counts(rollout_reuse=3) == CallCounts(prefix=14 / 3, constant=0, with_gradient=6)


def test_seconds_by_hand():
    work = Counter(
        {
            Operation("matrix", "float32", 4_000_000, 1000): 2,  # 4 ms of products each
            Operation("conv", "float32", 1_000_000, 5_000_000): 1,  # 2 ms of products, 5 ms of traffic
            Operation("other", "float32", 0, 3_000_000): 1,  # 3 ms
            Operation("attention", "float16", 1_000_000, 0): 1,  # not measured: as float32 products, 1 ms
            Operation("collective", "float32", 0, 4_000_000): 1,  # 10 ms
        }
    )
    assert phase_seconds(Phase(0, work=work), SLOW) == pytest.approx(0.027)
    slow_launch = dataclasses.replace(SLOW, launch_seconds=10e-3)
    assert phase_seconds(Phase(0, work=work), slow_launch) == pytest.approx(0.06), "six launches"


def test_settings_cost_what_they_do():
    _, given, card = tiny(num_frames=17)
    given.reward_funcs = ["flicker"]
    model = TracedModel(given, card)
    rates = dataclasses.replace(SLOW, flops=FLOPS | {"attention float32": 1e6}, launch_seconds=0)

    def plan(**settings):
        args = dataclasses.replace(given, **settings)
        return plan_time(model, args, plan_rewards(model, args), rates)

    plain, window = plan(), "gradient window"
    assert plan(gradient_accumulation_steps=2)["sampling"] == pytest.approx(2 * plain["sampling"])
    assert plan(**CHECKPOINTED)[window] > plan(**CHECKPOINTED, keep_attention=True)[window] > plain[window]
    assert plan(stepwise_backward=True)[window] > plain[window]
    assert plan(num_inference_steps=22)["sampling"] == pytest.approx(10 * plain["sampling"])  # two steps are the window
    assert plan(decode_chunk=1, decode_checkpoint=True)["decode"] > plain["decode"]
    assert plan(decode_window=5)["decode"] < plain["decode"]
    assert plan(method_kwargs={"relative_words": ["good", "bad"]})["reward"] == 2 * plain["reward"]
    assert plan(method="drtune")[window] < plain[window], "its latents are detached"
    listed = plan(method="listed", method_kwargs={"steps": [20, 21]}, num_inference_steps=22)
    assert listed[window] == plain[window]


def test_streamed_weights_take_the_time_of_their_copies():
    _, args, card = tiny(**CHECKPOINTED, stream_weights=True)
    model = TracedModel(args, card)
    rates = dataclasses.replace(SLOW, host_bandwidth=1.0)
    seconds = plan_time(model, args, plan_rewards(model, args), rates)["sampling"]
    assert seconds == pytest.approx(4 * 4 * model.frozen.blocks), "four calls before the window, in float32"


def test_communication_takes_time():
    """An all-reduce of the gradient, an all-gather of the base, an all-to-all of tokens."""
    pipe, args, card = tiny(num_frames=9, **CHECKPOINTED)
    rates = Rates({"matrix float32": 1e20}, 1e20, 1e20, peer_bandwidth=1.0, context_bytes=0, launch_seconds=0)
    args.reward_funcs = ["flicker"]

    def plan(processes, **settings):
        changed = dataclasses.replace(args, **settings)
        model = TracedModel(changed, card, processes)
        return model, plan_time(model, changed, plan_rewards(model, changed), rates)

    model, seconds = plan(4)
    assert seconds["optimizer"] == pytest.approx(2 * 4 * model.num_trained * 3 / 4)
    assert seconds["sampling"] < 1e-6
    model, seconds = plan(2, shard_base=True)
    calls = count_calls(args)
    assert seconds["sampling"] == pytest.approx(calls.prefix * 4 * model.frozen.blocks / 2)
    assert seconds["gradient window"] == pytest.approx(2 * calls.with_gradient * 4 * model.frozen.blocks / 2)
    model, seconds = plan(2, sequence_parallel=2)
    config, text = pipe.transformer.config, card["tokenizer"]["model_max_length"] + args.max_sequence_length
    own, width = model.num_tokens // 2, config.num_attention_heads * config.attention_head_dim
    of_block = 2 * width * (3 * own + own + text)  # queries, keys, values; results; the text's results, from all
    of_result = 2 * model.num_tokens * config.patch_size**2 * config.out_channels
    assert seconds["sampling"] == pytest.approx(calls.prefix * 4 * (config.num_layers * of_block + of_result) / 2)
    assert seconds["gradient window"] > 3 * seconds["sampling"], "forward, again, and backward"
