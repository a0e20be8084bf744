"""Traced calls hold what real calls hold."""

import dataclasses
import gc
from functools import partial
from math import prod

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from kept import KeptBytes
from plans import CHECKPOINTED, DECODED, tiny
from tiny import tiny_conditioning

from rlhf.adapter.lora import add_adapter, lora_config
from rlhf.adapter.masters import MasterWeights
from rlhf.config import RewardGradientConfig
from rlhf.contentv.transformer import QueryKeyNorm
from rlhf.execution.apply import ExecutionOptions, set_up_blocks
from rlhf.execution.offload import HostMemory
from rlhf.generator.files import model_sizes
from rlhf.generator.wan_decoder import decode_video
from rlhf.planner.time import H200, phase_seconds
from rlhf.planner.traced import TracedModel
from rlhf.planner.tracer import MetaOffload, Phase, Trace, fake_process_group, fused_attention
from rlhf.training.setup import latent_shape


def test_counts_are_those_of_the_real_modules():
    pipe, args, card = tiny()
    traced = TracedModel(args, card)
    assert sum(p.numel() for p in pipe.transformer.parameters()) == traced.frozen.blocks + traced.frozen.rest
    assert traced.latent_shape == latent_shape(pipe, args)
    add_adapter(pipe.transformer, lora_config(args), 0)
    assert traced.num_trained == MasterWeights(pipe.transformer).vector.numel()
    assert traced.adapter_bytes == 4 * traced.num_trained


@pytest.mark.parametrize(
    ("settings", "ranks"),  # the two heads have to be padded for three ranks
    [({}, 1), (CHECKPOINTED, 1), (CHECKPOINTED | {"keep_attention": True}, 1), ({}, 3), (CHECKPOINTED, 3)],
)
def test_a_transformer_call_keeps_what_autograd_holds(settings, ranks):
    pipe, args, card = tiny(attention_kernel="flash", sequence_parallel=ranks, **settings)
    model, call = pipe.transformer, TracedModel(args, card, ranks).transformer_call(args, 2)
    alone = TracedModel(dataclasses.replace(args, sequence_parallel=1), card).transformer_call(args, 2)
    add_adapter(model, lora_config(args), 0)
    latents = torch.randn(2, *latent_shape(pipe, args)).requires_grad_()
    cond = tiny_conditioning(2, card["tokenizer"]["model_max_length"] + args.max_sequence_length)
    with fake_process_group(ranks) as group:
        set_up_blocks(model, ExecutionOptions.from_settings(args), torch.device("cpu"), group)
        with KeptBytes(model) as kept:
            (v,) = model(latents, cond.prompt_embeds_BLD, cond.pooled_embeds_BP, torch.ones(2), return_dict=False)
            held = kept.now
            v.sum().backward()
    # On a CPU the norms of queries and keys keep more than one kernel's; the result and what is
    # alive come on top.
    assert call.saved_bytes == pytest.approx(held + v.nbytes, rel=0.1)
    assert call.backward.peak_bytes > call.saved_bytes
    assert call.backward.peak_bytes >= 0.9 * kept.most
    assert ranks == 1 or call.saved_bytes < 0.8 * alone.saved_bytes, "all of the text, and a third of the video"


@pytest.mark.parametrize("keep_attention", [False, True])
def test_nothing_of_a_call_waits_for_the_garbage_collector(keep_attention):
    _, args, card = tiny(**CHECKPOINTED, keep_attention=keep_attention)
    traced = TracedModel(args, card)
    gc.disable()
    try:
        call = traced.transformer_call(args, 2)
    finally:
        gc.enable()
    latents = 2 * prod(traced.latent_shape) * 4
    left = call.backward.bytes_after - call.forward.bytes_before
    assert left <= traced.adapter_bytes + 4 * latents  # velocity, its gradient and that of the latents


@pytest.mark.parametrize("frames", [1, 17])
@pytest.mark.parametrize("settings", [{}, DECODED, DECODED | {"decode_caches": "host"}, DECODED | {"decode_chunk": 3}])
def test_the_decoder_keeps_what_autograd_holds(settings, frames, monkeypatch):
    monkeypatch.setattr("rlhf.planner.traced.MetaOffload", lambda: MetaOffload(0))  # nothing is too small to go there
    pipe, args, card = tiny(num_frames=17, **settings)
    call = TracedModel(args, card).decoder_call(args, 2, frames)
    latents = torch.randn(2, *latent_shape(pipe, args)).requires_grad_()
    caches = HostMemory("cpu", smallest_bytes=0) if args.decode_caches == "host" else None
    pipe.vae.requires_grad_(False)
    with KeptBytes(pipe.vae) as kept:
        video = decode_video(pipe.vae, latents, frames, args.decode_chunk, args.decode_checkpoint, 0, caches)
        held = kept.now
        video.sum().backward()
    assert call.saved_bytes == pytest.approx(held + video.nbytes, rel=0.1)
    assert kept.most <= 1.02 * call.backward.peak_bytes
    if args.decode_caches != "host":  # what comes back from there, autograd does not hold
        assert call.backward.peak_bytes <= 4 * (kept.most + video.nbytes)


def sizes_of(phase: Phase) -> tuple:
    return phase.bytes_before, phase.bytes_after, phase.peak_bytes, phase.launches


def test_many_chunks_are_extrapolated_from_a_few(monkeypatch):
    _, args, card = tiny(**DECODED | {"decode_caches": "host"})
    short = TracedModel(args, card).decoder_call(args, 1, 33)
    monkeypatch.setattr("rlhf.planner.traced.TRACED_CHUNKS", 100)
    whole = TracedModel(args, card).decoder_call(args, 1, 33)
    for way in ("forward", "backward"):
        a, b = getattr(short, way), getattr(whole, way)
        assert sizes_of(a) == sizes_of(b)
        assert phase_seconds(a, H200) == pytest.approx(phase_seconds(b, H200))


@pytest.mark.parametrize("settings", [{}, CHECKPOINTED | {"keep_attention": True, "offload_activations": True}])
def test_many_blocks_are_extrapolated_from_a_few(settings, monkeypatch):
    _, args, card = tiny(**settings)
    card = card | {"transformer": card["transformer"] | {"num_layers": 8}}
    short = TracedModel(args, card).transformer_call(args, 1)
    monkeypatch.setattr("rlhf.planner.traced.TRACED_BLOCKS", 100)
    whole = TracedModel(args, card).transformer_call(args, 1)
    for way in ("no_grad", "forward", "backward"):
        a, b = getattr(short, way), getattr(whole, way)
        assert sizes_of(a) == sizes_of(b)


def test_the_stock_model_needs_what_was_measured_of_it(monkeypatch):
    """Peaks in GiB on one H200, with 15.33 GiB of weights: checkpointed blocks."""
    fused = lambda query, key, value, **kwargs: fused_attention(query, key, value)
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", fused)
    args = RewardGradientConfig(model="ByteDance/ContentV-8B", lora_rank=32, num_frames=33, dtype="bfloat16")
    card, make, most = model_sizes(args.model), partial(torch.empty, device="meta", dtype=torch.bfloat16), []
    for blocks in (3, 4):
        model = TracedModel(args, card | {"transformer": card["transformer"] | {"num_layers": blocks}}).transformer
        for module in model.modules():
            if isinstance(module, QueryKeyNorm):
                module.__class__ = RMSNorm
        model.enable_gradient_checkpointing()
        model.pos_embed._tables[(9, 27, 48), torch.device("meta"), torch.bfloat16] = make(11664, 2432)
        with Trace(model) as trace, trace.phase() as phase:
            inputs = make(1, 16, 9, 54, 96), make(1, 333, 4096), make(1, 2048), torch.empty(1, device="meta")
            (v,) = model(*inputs, return_dict=False)
            v.backward(torch.empty_like(v))
        most.append(phase.peak_bytes / 2**30)
    assert 15.33 + most[1] + 34 * (most[1] - most[0]) == pytest.approx(18.96, rel=0.02)


def test_the_stock_decoder_needs_what_was_measured_of_it():
    """GiB above the weights on one H200: two latent frames of 432x768, forward and backward."""
    args = RewardGradientConfig(model="ByteDance/ContentV-8B")
    vae = TracedModel(args, model_sizes(args.model)).vae.to(torch.bfloat16)
    with Trace(vae) as trace, trace.phase() as phase:
        z = torch.empty(1, 16, 2, 54, 96, device="meta", dtype=torch.bfloat16).requires_grad_()
        video = vae.decode(z, return_dict=False)[0]
        video.backward(torch.empty_like(video))
    assert phase.peak_bytes / 2**30 == pytest.approx(19, rel=0.05)
