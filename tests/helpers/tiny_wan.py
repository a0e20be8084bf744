"""Tiny random Wan models: the real classes of diffusers, and the published layout on disk."""

from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from tiny import SAMPLING, TEXT_WIDTH, draw, t5_sizes, t5_tokenizer, tiny_vae

from rlhf.types import Conditioning
from rlhf.wan.pipeline import EulerFlowScheduler, WanPipeline
from rlhf.wan.transformer import WanTransformer3DModel

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def tiny_wan_transformer(seed: int = 0, cls=WanTransformer3DModel, **sizes) -> diffusers.WanTransformer3DModel:
    """Two blocks, two heads of 12; biases and modulations are random, too."""
    sizes = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 16,
        "ffn_dim": 40,
        "rope_max_seq_len": 32,
    } | sizes
    return draw(cls(**sizes), seed)


def stock_wan_pipeline(seed: int = 0, shift: float = 3.0) -> diffusers.WanPipeline:
    """Return diffusers' own Wan pipeline, as published: UMT5, UniPC, tiny and random."""
    t5 = t5_tokenizer()
    encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(**t5_sizes(t5)))
    pipe = diffusers.WanPipeline(
        tokenizer=t5,
        text_encoder=draw(encoder, seed + 1),
        vae=tiny_vae(seed),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        ),
        transformer=tiny_wan_transformer(seed, diffusers.WanTransformer3DModel),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_wan_pipeline(seed: int = 0) -> WanPipeline:
    """All of Wan on the CPU, in float32 and evaluation mode."""
    parts = stock_wan_pipeline(seed).components
    named = {name: parts[name] for name in ("tokenizer", "text_encoder", "vae")}
    pipe = WanPipeline(transformer=tiny_wan_transformer(seed), scheduler=EulerFlowScheduler(shift=3.0), **named)
    pipe.sampling = SAMPLING
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_wan_conditioning(batch: int = 1, tokens: int = 6, seed: int = 0, dtype=torch.float32) -> Conditioning:
    """Random embeddings of the tiny transformer's width, and no pooled ones."""
    generator = torch.Generator().manual_seed(seed)
    text, negative = (torch.randn(batch, tokens, TEXT_WIDTH, generator=generator, dtype=dtype) for _ in range(2))
    return Conditioning(text, text[:, 0, :0], negative, negative[:, 0, :0])


def save_tiny_wan(folder: Path) -> Path:
    """Write a tiny Wan in the published layout, with sampling defaults of its size."""
    stock_wan_pipeline().save_pretrained(folder)
    SAMPLING.save(folder)
    return folder


def euler(stock):
    """The stock pipeline with Euler steps through evenly spaced sigmas before the shift."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    set_timesteps = scheduler.set_timesteps
    scheduler.set_timesteps = lambda n, device: set_timesteps(sigmas=np.linspace(1, 0, n + 1)[:-1], device=device)
    stock.scheduler = scheduler
    return stock
