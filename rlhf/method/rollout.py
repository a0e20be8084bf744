"""From noise to latents, in two phases: a no-grad prefix, then the window with gradient.

The sampler solves the flow dx/dsigma = v(x, sigma) from sigma = 1 to 0 by Euler steps
x_i+1 = x_i + (sigma_i+1 - sigma_i) v(x_i, sigma_i) (arXiv 2210.02747).

Shape legend: B batch, C channels, T latent frames, H W latent height and width, N denoising steps.
"""

from collections.abc import Callable

import torch

from rlhf.device import generator
from rlhf.generator.flow import euler_step

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x_BCTHW, sigma) -> dx/dsigma


@torch.no_grad()
def sample_euler(velocity: Velocity, noise_BCTHW: torch.Tensor, sigmas: torch.Tensor) -> list[torch.Tensor]:
    """Return the states x_0 (noise) .. x_N (video) of Euler steps through sigmas (N+1,)."""
    states = [noise_BCTHW]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = states[-1]
        states.append(euler_step(x, velocity(x, sigma), sigma, sigma_next))
    return states


def rollout(
    prefix: Velocity,
    window: Velocity,
    noise_BCTHW: torch.Tensor,
    sigmas: torch.Tensor,
    grad_steps: list[int],
    detach_input: bool = False,
    start: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """Return the states x_0 (noise) .. x_N (video), (B, C, T, H, W) each.

    Those up to the start of the window have no gradient.

    Args:
        prefix: the velocity of no-grad steps, before the window and inside it.
        window: the velocity of the steps that carry the gradient.
        noise_BCTHW: x_0, unit normal, float32.
        sigmas: noise levels (N+1,), float32, from 1 down to 0.
        grad_steps: the steps that carry the gradient, rising; [] for none. The window reaches from
            the first of them to step N-1. Its other steps pass the gradient on unchanged.
        detach_input: whether x_i enters the velocity without gradient (DRTune, arXiv 2405.00760,
            algorithm 1). The gradient of x_N is then the sum over grad_steps of
            (sigma_i+1 - sigma_i) dv_i/dtheta.
        start: the window's first state, of an earlier rollout; the states before it are then None.
    """
    num_steps = len(sigmas) - 1
    first = grad_steps[0] if grad_steps else num_steps

    states = [None] * first + [start]
    if start is None:
        states = sample_euler(prefix, noise_BCTHW, sigmas[: first + 1])

    for i in range(first, num_steps):
        x = states[-1]
        if i in grad_steps:
            v = window(x.detach() if detach_input else x, sigmas[i])
        else:
            with torch.no_grad():
                v = prefix(x, sigmas[i])
        states.append(euler_step(x, v, sigmas[i], sigmas[i + 1]))
    return states


class RolloutCache:
    """Window starts (B, C, T, H, W), each used in `reuse` optimizer steps. Exact for reuse 1.

    A step's gradient is that of its own adapter from the cached start on; the start is up to
    reuse - 1 steps old. The cache is not part of a checkpoint: a resumed run samples anew.
    """

    def __init__(self, reuse: int):
        self.reuse = reuse
        self.starts: dict[int, tuple[int, torch.Tensor]] = {}  # micro batch -> (rollout, start)

    def rollout_index(self, step: int, micro: int) -> int:
        """Return the rollout that batch `micro` uses; batches resample at staggered steps."""
        return (step + micro % self.reuse) // self.reuse

    def get(self, step: int, micro: int) -> torch.Tensor | None:
        """Return the cached window start of batch `micro`, or None if it has to be sampled."""
        rollout, start = self.starts.get(micro, (None, None))
        return start if rollout == self.rollout_index(step, micro) else None

    def put(self, step: int, micro: int, start: torch.Tensor) -> None:
        """Cache the window start of batch `micro` for the steps that reuse it."""
        if self.reuse > 1:
            self.starts[micro] = self.rollout_index(step, micro), start


def draw_noise(shape_CTHW: tuple[int, int, int, int], seed: int, purpose: str, samples: list[tuple]) -> torch.Tensor:
    """Draw unit normal noise (B, C, T, H, W), float32 on the CPU.

    Sample i's noise depends on (purpose, seed, *samples[i]) alone, so it is the same on every
    device, in every batch and for every number of processes.
    """
    return torch.stack([torch.randn(shape_CTHW, generator=generator(purpose, seed, *key)) for key in samples])
