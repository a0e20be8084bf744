"""The flow's sampler in three functions: sigmas, guided velocity, Euler step.

Shape legend: B batch, C channels, T latent frames, H W latent height and width.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from rlhf.types import Conditioning

NUM_TRAIN_TIMESTEPS = 1000  # transformers are trained on timestep = 1000 * sigma


def flow_sigmas(
    scheduler: FlowMatchEulerDiscreteScheduler, num_steps: int, device: torch.device | None = None
) -> torch.Tensor:
    """Return float32 sigmas (num_steps + 1,) from 1 to 0, linear but for the scheduler's shift."""
    if num_steps < 1:
        raise ValueError(f"num_inference_steps={num_steps}, expected at least 1; raise it")
    assert scheduler.config.num_train_timesteps == NUM_TRAIN_TIMESTEPS
    scheduler = copy.copy(scheduler)  # set_timesteps writes into the scheduler
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, num_steps + 1)[:-1], device=device)
    return scheduler.sigmas


def guided_velocity(
    transformer: Callable,
    latents_BCTHW: torch.Tensor,
    sigma: torch.Tensor,
    cond: Conditioning,
    guidance_scale: float,
    joint_attention_kwargs: dict[str, Any] | None = None,
    together: bool = False,
) -> torch.Tensor:
    """Return v_neg + g (v_text - v_neg) in the latents' shape and dtype (arXiv 2207.12598).

    Args:
        transformer: as `rlhf.generator.registry` describes it, with a `dtype`.
        latents_BCTHW: float32, for any dtype of the transformer.
        sigma: 0-d or (B,), float32, in [0, 1].
        cond: embeddings of B prompts; the negative ones are used only for guidance_scale > 1.
        guidance_scale: g; at 1 or less there is no guidance, and one forward instead of two.
        together: run both branches as one batch of 2B: fewer and larger kernels, twice the memory.

    Raises:
        ValueError: guidance_scale > 1 without negative embeddings.
    """
    dtype = transformer.dtype

    def velocity(latents_BCTHW, embeds_BLD, pooled_BP):
        (v,) = transformer(
            latents_BCTHW.to(dtype),
            embeds_BLD.to(dtype),
            pooled_BP.to(dtype),
            (sigma * NUM_TRAIN_TIMESTEPS).expand(latents_BCTHW.shape[0]),
            joint_attention_kwargs=joint_attention_kwargs,
            return_dict=False,
        )
        return v.to(latents_BCTHW.dtype)

    text = cond.prompt_embeds_BLD, cond.pooled_embeds_BP
    if guidance_scale <= 1:
        return velocity(latents_BCTHW, *text)
    if cond.negative_embeds_BLD is None or cond.negative_pooled_BP is None:
        raise ValueError(
            f"guidance_scale={guidance_scale} but the conditioning has no negative embeddings; encode a negative "
            "prompt (an empty one will do) or set guidance_scale to 1"
        )
    negative = cond.negative_embeds_BLD, cond.negative_pooled_BP
    if together:
        both = (torch.cat(pair) for pair in zip(text, negative, strict=True))
        v_text, v_neg = velocity(torch.cat([latents_BCTHW] * 2), *both).chunk(2)
    else:
        v_text, v_neg = velocity(latents_BCTHW, *text), velocity(latents_BCTHW, *negative)
    return v_neg + guidance_scale * (v_text - v_neg)


def euler_step(
    latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor
) -> torch.Tensor:
    """Return x + (sigma_next - sigma) v in the dtype of the latents (arXiv 2403.03206, eq. 1)."""
    return latents + (sigma_next - sigma) * velocity
