"""From noise to latents, in two phases: a prefix without gradient, then the window that the gradient runs through.

Shape legend: B batch, C channels, T latent frames, H W latent height and width, N denoising steps.
"""

import torch

from rlhf.contentv.pipeline import euler_step, guided_velocity
from rlhf.device import generator
from rlhf.types import Conditioning


def rollout(
    transformer,
    noise_BCTHW: torch.Tensor,
    cond: Conditioning,
    sigmas: torch.Tensor,
    guidance_scale: float,
    grad_steps: list[int],
) -> torch.Tensor:
    """Latents (B, C, T, H, W), float32, after all N Euler steps of the flow dx/dsigma = v (arXiv 2210.02747).

    Args:
        noise_BCTHW: float32, unit normal.
        sigmas: (N+1,) float32 from 1 down to 0.
        grad_steps: the last steps, consecutive, or [] for none: from the first of them on, the latents and both
            branches of guidance carry the gradient.
    """
    num_steps = len(sigmas) - 1
    start = grad_steps[0] if grad_steps else num_steps
    assert grad_steps == list(range(start, num_steps)), f"the gradient window {grad_steps} must end the rollout"
    x = noise_BCTHW
    with torch.no_grad():
        for i in range(start):
            v = guided_velocity(transformer, x, sigmas[i], cond, guidance_scale)
            x = euler_step(x, v, sigmas[i], sigmas[i + 1])
    for i in range(start, num_steps):
        v = guided_velocity(transformer, x, sigmas[i], cond, guidance_scale)
        x = euler_step(x, v, sigmas[i], sigmas[i + 1])
    return x


def draw_noise(shape_CTHW: tuple[int, int, int, int], seed: int, purpose: str, samples: list[tuple]) -> torch.Tensor:
    """Unit normal noise (B, C, T, H, W), float32 on the CPU; sample i's comes from (purpose, seed, *samples[i]) alone.

    So a sample's noise is the same on every device, in every batch and on every number of processes.
    """
    draws = (torch.randn(shape_CTHW, generator=generator(purpose, seed, *key)) for key in samples)
    return torch.stack(list(draws))
