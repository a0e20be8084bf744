"""Parts put together as the trainer does."""

import dataclasses

import pytest
import torch
from test_parts import CHECKPOINTED, DECODED, tiny

from rlhf.checks import model_card, with_sampling
from rlhf.config import RewardGradientConfig
from rlhf.memory_plan import MemoryPlan, plan_memory, plan_rewards
from rlhf.parts import Parts

GIB = 2**30


def test_settings_lower_what_they_are_for():
    _, args, card = tiny(eval_prompts="none", num_frames=17)
    parts = Parts(args, card)
    rewards = plan_rewards(parts, args)

    def plan(**settings) -> MemoryPlan:
        return plan_memory(parts, dataclasses.replace(args, **settings), rewards)

    plain, stepwise = plan(), plan(stepwise_backward=True)
    blocks, attention = plan(**CHECKPOINTED), plan(**CHECKPOINTED, keep_attention=True)
    segment, decoding = "gradient segment", "decoding and back"
    assert stepwise.phases[segment] < 0.4 * plain.phases[segment], "one of four graphs at a time"
    assert stepwise.phases[decoding] < plain.phases[decoding]
    assert blocks.phases[segment] < attention.phases[segment] < plain.phases[segment]
    assert plan(**CHECKPOINTED, stream_weights=True).held["transformer"] < plain.held["transformer"]
    assert plan(base_bits=4).held["transformer"] < 0.4 * plain.held["transformer"]
    assert plan(guidance_scale=1.0).phases[segment] < 0.6 * plain.phases[segment]
    assert plan(guidance_together=True).phases["sampling"] > 1.5 * plain.phases["sampling"]
    assert plan(**DECODED, stepwise_backward=True).phases[decoding] < stepwise.phases[decoding]
    assert plan(decode_window=5).phases[decoding] < plain.phases[decoding]
    assert plan(sampling_weights="merged").held["sampling copy"] > 0
    assert plan(ema_decay=0.9).held["adapter and optimizer"] > plain.held["adapter and optimizer"]
    assert plain.most == sum(plain.held.values()) + max(plain.phases.values())


def test_graphs_wait_for_the_decoder_unless_taken_one_by_one():
    _, args, card = tiny(eval_prompts="none")
    parts = Parts(args, card)
    plain = plan_memory(parts, args, plan_rewards(parts, args))
    decoder, branch = parts.decoder(args, 2, 33), parts.branch(args, 2)
    most = max(decoder.forward.most, decoder.backward.most) - decoder.forward.start
    assert plain.phases["decoding and back"] == 2 * 2 * branch.kept + most


def test_an_evaluation_decodes_every_frame():
    _, args, card = tiny(per_device_eval_batch_size=16, eval_prompts="nano_held_out")
    parts = Parts(args, card)
    found = plan_memory(parts, args, plan_rewards(parts, args)).phases["evaluation"]
    assert found >= 16 * 3 * 33 * args.height * args.width * 4


@pytest.mark.parametrize(
    ("settings", "frames", "weights", "unknown"),
    [
        ({"reward_funcs": ["hps_v2_1"]}, 1, 3.674, ()),
        ({"reward_funcs": ["hps_v2_1"], "reward_kwargs": {"hps_v2_1": {"frames": "all"}}}, 33, 3.674, ()),
        ({"reward_funcs": ["hps_v2_1", "clip_score"], "eval_reward_funcs": ["mps"]}, 1, 3.674 + 1.593 + 4.115, ()),
        ({"reward_funcs": ["my.module:Mine"]}, 33, 0, ("my.module:Mine",)),
        ({"reward_funcs": ["nano_preference"]}, 33, 0.00445, ()),
    ],
)
def test_rewards_are_taken_as_measured(settings, frames, weights, unknown):
    _, args, card = tiny(**settings)
    found = plan_rewards(Parts(args, card), args)
    assert (found.frames, found.unknown) == (frames, unknown)
    assert found.weights / GIB == pytest.approx(weights, rel=0.01)
    assert (found.memory > 0) == (unknown == ())


def test_the_whole_video_of_contentv_8b_on_one_card():
    """What the settings of configs/contentv_8b_all_frames.yaml are for, worked out: no weights are loaded."""
    exact = CHECKPOINTED | DECODED | {"keep_attention": True, "stepwise_backward": True, "decode_caches": "host"}
    common = {"model": "ByteDance/ContentV-8B", "lora_rank": 32, "vae_dtype": "bfloat16", "eval_prompts": None}
    args = RewardGradientConfig(reward_funcs=["hps_v2_1"], **common, **exact)
    card = model_card(args.model)
    args = with_sampling(args, card["sampling"])
    parts = Parts(args, card)
    whole = {"hps_v2_1": {"frames": "all", "num_frames": 8}}
    parts.args.reward_kwargs = whole
    plan = plan_memory(parts, args, plan_rewards(parts, args))
    assert 36 < plan.most / GIB < 40
    assert plan.held["transformer"] == pytest.approx(15.01 * GIB, rel=1e-3)
    assert parts.transformer.dtype == torch.bfloat16
