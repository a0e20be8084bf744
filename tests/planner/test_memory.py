"""Peak memory by phase: what each setting changes, and the peaks that were measured."""

import dataclasses
import json
from pathlib import Path

import pytest
from plans import CHECKPOINTED, DECODED, tiny

from rewards.models.latent_reward import HeadFacts, LatentHead, save_head
from rlhf.config import RewardGradientConfig, with_sampling
from rlhf.generator.files import model_sizes
from rlhf.planner.memory import MemoryPlan, plan_memory, plan_rewards
from rlhf.planner.traced import TracedModel

GIB, ROOT = 2**30, Path(__file__).parents[2]


def test_settings_lower_what_they_are_for():
    _, args, card = tiny(eval_prompts="none", num_frames=17)
    model = TracedModel(args, card)
    rewards = plan_rewards(model, args)

    def plan(**settings) -> MemoryPlan:
        return plan_memory(model, dataclasses.replace(args, **settings), rewards)

    plain, stepwise = plan(), plan(stepwise_backward=True)
    blocks, attention = plan(**CHECKPOINTED), plan(**CHECKPOINTED, keep_attention=True)
    segment, decoding = "gradient window", "decode"
    assert stepwise.phases[segment] < 0.4 * plain.phases[segment], "one of four graphs at a time"
    assert stepwise.phases[decoding] < plain.phases[decoding]
    assert blocks.phases[segment] < attention.phases[segment] < plain.phases[segment]
    assert plan(**CHECKPOINTED, stream_weights=True).held["transformer"] < plain.held["transformer"]
    assert plan(base_bits=4).held["transformer"] < 0.4 * plain.held["transformer"]
    assert plan(guidance_scale=1.0).phases[segment] < 0.6 * plain.phases[segment]
    assert plan(guidance_together=True).phases["sampling"] > 1.5 * plain.phases["sampling"]
    assert plan(**DECODED, stepwise_backward=True).phases[decoding] < stepwise.phases[decoding]
    assert plan(decode_window=5).phases[decoding] < plain.phases[decoding]
    encoding = [plan(anchor_data="videos", vae_dtype=d).phases["encoding videos"] for d in ("float32", "bfloat16")]
    assert 0 < encoding[1] < 0.6 * encoding[0] < plain.phases[decoding]
    assert plan(ema_decay=0.9).held["adapter and optimizer"] > plain.held["adapter and optimizer"]
    assert plain.peak_bytes == sum(plain.held.values()) + max(plain.phases.values())


def test_processes_share_what_their_layout_divides():
    _, args, card = tiny(eval_prompts="none", num_frames=17, reward_funcs=["hps_v2_1"])  # which scores the first

    def plan(processes: int, **settings) -> MemoryPlan:
        changed = dataclasses.replace(args, **settings)
        model = TracedModel(changed, card, processes)
        return plan_memory(model, changed, plan_rewards(model, changed))

    alone, data, guidance = plan(1), plan(4), plan(2, guidance_parallel=2)
    tokens, sharded = plan(2, sequence_parallel=2), plan(4, shard_base=True)
    model, segment = TracedModel(args, card), "gradient window"
    assert data == dataclasses.replace(alone, phases=alone.phases | {"optimizer": 4 * model.num_trained})
    assert guidance.held == tokens.held == alone.held
    assert guidance.phases[segment] < 0.6 * alone.phases[segment], "two graphs of four"
    assert tokens.phases[segment] < 0.8 * alone.phases[segment]
    assert guidance.phases["reward"] < alone.phases["reward"], "fewer graphs wait"
    of_blocks, of_one, rest = model.frozen
    assert sharded.held["transformer"] == 4 * (of_blocks + rest) // 4
    assert sharded.phases["sampling"] - alone.phases["sampling"] == 4 * (2 * of_one + rest)
    assert sharded.phases["decode"] == alone.phases["decode"], "all is divided by then"
    both = plan(4, guidance_parallel=2, sequence_parallel=2, shard_base=True)
    assert both.peak_bytes < min(guidance.peak_bytes, tokens.peak_bytes)


def test_the_encoder_that_takes_most_is_there_before_the_transformer_is():
    _, args, card = tiny(eval_prompts="none", num_frames=17)
    model = TracedModel(args, card)
    rewards, size = plan_rewards(model, args), 10**9
    plan = plan_memory(model, args, rewards, size)
    assert plan.peak_phase == "encoding prompts"
    assert plan.peak_bytes == size + plan.held["rewards"]
    assert plan_memory(model, args, rewards, 1).phases["encoding prompts"] == 0


def test_graphs_wait_for_the_decoder_unless_taken_one_by_one():
    _, args, card = tiny(eval_prompts="none")
    model = TracedModel(args, card)
    plain = plan_memory(model, args, plan_rewards(model, args))
    decoder, branch = model.decoder_call(args, 2, 33), model.transformer_call(args, 2)
    assert plain.phases["decode"] == 2 * 2 * branch.saved_bytes + decoder.peak_bytes


def test_two_leaps_wait_together_and_an_adjoint_not_at_all():
    _, args, card = tiny(eval_prompts="none", num_grad_steps=1)
    leaps, adjoint = (dataclasses.replace(args, method=method) for method in ("leap_align", "adjoint_matching"))
    model = TracedModel(leaps, card)
    decoder, branch = model.decoder_call(leaps, 2, 33), model.transformer_call(leaps, 2)
    found = plan_memory(model, leaps, plan_rewards(model, leaps))
    assert found.phases["decode"] == 2 * 2 * branch.saved_bytes + decoder.peak_bytes
    found = plan_memory(model, adjoint, plan_rewards(model, adjoint))
    assert found.phases["decode"] == decoder.peak_bytes
    robust = dataclasses.replace(adjoint, method_kwargs={"weight_perturbation": 0.1})
    assert (
        plan_memory(model, robust, plan_rewards(model, robust)).held_bytes == found.held_bytes + 8 * model.num_trained
    )


def test_a_reward_of_latents_takes_its_blocks_and_no_decoding(tmp_path):
    """Its weights and its call are those of the reward itself, traced on tensors without storage."""
    pipe, args, card = tiny(eval_prompts="none", num_grad_steps=1, method="prfl", num_frames=9)
    facts = HeadFacts("nano", "", 3, {}, 0.0, 1.0, {})
    save_head(tmp_path / "head.safetensors", LatentHead(32), facts)
    settings = {
        "reward_funcs": ["latent_reward"],
        "reward_kwargs": {"latent_reward": {"path": str(tmp_path / "head.safetensors")}},
    }
    args = dataclasses.replace(args, **settings)
    model = TracedModel(args, card)
    found, none = plan_rewards(model, args), plan_rewards(model, dataclasses.replace(args, reward_funcs=["flicker"]))
    assert (found.decoded_frames, found.unknown) == (0, ())
    blocks = pipe.transformer.transformer_blocks[:3]
    rest = sum(p.nbytes for name, p in pipe.transformer.named_parameters() if "blocks" not in name)
    table = pipe.transformer.position_bytes(model.num_tokens)
    assert found.weight_bytes - none.weight_bytes == sum(p.nbytes for p in blocks.parameters()) + rest + table
    plan = plan_memory(model, args, found)
    assert plan.phases["decode"] == 2 * model.transformer_call(args, 2).saved_bytes, "the graph of the step alone"
    assert plan.phases["reward"] > plan.phases["decode"]
    kept = dataclasses.replace(
        args, reward_kwargs={"latent_reward": settings["reward_kwargs"]["latent_reward"] | {"recompute": False}}
    )
    assert plan_rewards(model, kept).peak_bytes > 1.3 * found.peak_bytes
    beside = dataclasses.replace(args, reward_funcs=["latent_reward", "flicker"])
    assert plan_rewards(model, beside).decoded_frames == 9


def test_an_evaluation_decodes_every_frame():
    _, args, card = tiny(per_device_eval_batch_size=16, eval_prompts="nano_held_out")
    model = TracedModel(args, card)
    found = plan_memory(model, args, plan_rewards(model, args)).phases["evaluation"]
    assert found >= 16 * 3 * 33 * args.height * args.width * 4


def test_an_evaluation_of_another_size_is_planned_at_that_size():
    def plan(**settings):
        _, args, card = tiny(eval_prompts="nano_held_out", **settings)
        model = TracedModel(args, card)
        return plan_memory(model, args, plan_rewards(model, args)), args

    (small, args), (large, _) = plan(), plan(eval_size={"height": 128, "num_frames": 41})
    (trained, _) = plan(height=128, num_frames=41)
    assert args.height < 128
    table = trained.held["position table"]
    assert large.phases["evaluation"] == trained.phases["evaluation"] + table > small.phases["evaluation"] + table
    assert {**large.phases, "evaluation": 0} == {**small.phases, "evaluation": 0}
    assert large.held == small.held


@pytest.mark.parametrize(
    ("settings", "frames", "weights", "unknown"),
    [
        ({"reward_funcs": ["hps_v2_1"]}, 1, 3.674, ()),
        ({"reward_funcs": ["hps_v2_1"], "reward_kwargs": {"hps_v2_1": {"frames": "all"}}}, 33, 3.674, ()),
        ({"reward_funcs": ["hps_v2_1", "clip_score"], "eval_reward_funcs": ["mps"]}, 1, 3.674 + 1.593 + 4.115, ()),
        ({"reward_funcs": ["a=hps_v2_1", "b=hps_v2_1"], "reward_kwargs": {"b": {"frames": 5}}}, 5, 2 * 3.674, ()),
        ({"reward_funcs": ["my.module:Mine"]}, 33, 0, ("my.module:Mine",)),
        ({"reward_funcs": ["nano_preference"]}, 33, 0.00445, ()),
    ],
)
def test_rewards_are_taken_as_measured(settings, frames, weights, unknown):
    _, args, card = tiny(**settings)
    found = plan_rewards(TracedModel(args, card), args)
    assert (found.decoded_frames, found.unknown) == (frames, unknown)
    assert found.weight_bytes / GIB == pytest.approx(weights, rel=0.01)
    assert (found.peak_bytes > 0) == (unknown == ())


def test_a_reward_is_planned_by_its_own_frames_not_by_those_of_its_neighbours():
    def plan(*names):
        _, args, card = tiny(reward_funcs=list(names))
        return plan_rewards(TracedModel(args, card), args)

    both, image, video = plan("aesthetic", "motion_degree"), plan("aesthetic"), plan("motion_degree")
    assert (image.decoded_frames, video.decoded_frames, both.decoded_frames) == (1, 33, 33)
    assert both.seconds == pytest.approx(image.seconds + video.seconds)
    assert both.peak_bytes == max(image.peak_bytes, video.peak_bytes)


MEASURED = json.loads((ROOT / "bench" / "results" / "step.json").read_text())["rows"]
PLANNED = ("sampling", "segment", "decode and back", "window")
MODELS: dict[tuple, TracedModel] = {}


@pytest.mark.slow
@pytest.mark.parametrize(("arm", "frames"), [("exact", 125), ("exact, nothing twice", 33), ("24 GiB", 33)])
def test_the_plan_is_what_was_measured_at_full_size(arm, frames):
    """Peaks of bench/step.py, weights and all, on one H200; nothing here was fitted to them."""
    rows = [row for row in MEASURED if row["arm"] == arm and row["frames"] == frames and row["phase"] in PLANNED]
    assert rows
    for row in rows:
        of_reward = {"frames": "first" if row["scored"] == 1 else "all", "num_frames": 8}
        settings = {"num_frames": frames, "lora_rank": 32, "reward_kwargs": {"hps_v2_1": of_reward}}
        settings |= {"model": "ByteDance/ContentV-8B", "reward_funcs": ["hps_v2_1"], "eval_prompts": None}
        args = RewardGradientConfig(**settings, **row["settings"])
        card = model_sizes(args.model)
        args = with_sampling(args, card["sampling"])
        key = (arm, row["scored"])
        model = MODELS.setdefault(key, TracedModel(args, card))
        rewards = plan_rewards(model, args)
        plan = plan_memory(model, args, rewards)
        planned = {
            "sampling": plan.phases["sampling"],
            "segment": model.transformer_call(args, 1).peak_bytes,  # of one branch
            "decode and back": model.decoder_call(args, 1, rewards.decoded_frames).peak_bytes,
            "window": max(plan.phases.values()),
        }
        peak_gib = (plan.held_bytes + planned[row["phase"]]) / GIB
        assert peak_gib == pytest.approx(row["peak_gib"], rel=0.035), row["phase"]
