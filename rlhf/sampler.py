"""From noise to latents, in two phases: a prefix without gradient, then the window that the gradient runs through.

Shape legend: B batch, C channels, T latent frames, H W latent height and width, N denoising steps.
"""

from collections.abc import Callable

import torch

from rlhf.contentv.flow import euler_step, guided_velocity
from rlhf.device import generator
from rlhf.types import Conditioning

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (latents_BCTHW, sigma) -> dx/dsigma, of x's shape


def rollout(
    velocity: Velocity,
    noise_BCTHW: torch.Tensor,
    sigmas: torch.Tensor,
    grad_steps: list[int],
    detach_input: bool = False,
    reuse: Callable[[Callable[[], torch.Tensor]], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Latents (B, C, T, H, W), float32, after all N Euler steps of the flow dx/dsigma = v (arXiv 2210.02747).

    Args:
        noise_BCTHW: float32, unit normal.
        sigmas: (N+1,) float32 from 1 down to 0.
        grad_steps: the steps whose velocity carries the gradient, rising, or [] for none. The window reaches from the
            first of them to the end; a step of the window that is not among them passes the gradient on unchanged.
        detach_input: a velocity's own input passes no gradient on (DRTune, arXiv 2405.00760, algorithm 1): what is
            left of the gradient of x_N is the direct path, the sum over grad_steps of (sigma_i+1 - sigma_i) dv/dtheta.
        reuse: gives the state at which the window starts; called with what computes it (`rlhf.prefix.PrefixBuffer`).
    """
    num_steps = len(sigmas) - 1
    start = grad_steps[0] if grad_steps else num_steps

    @torch.no_grad()
    def prefix():
        x = noise_BCTHW
        for i in range(start):
            x = euler_step(x, velocity(x, sigmas[i]), sigmas[i], sigmas[i + 1])
        return x

    x = prefix() if reuse is None else reuse(prefix)
    for i in range(start, num_steps):
        with torch.set_grad_enabled(i in grad_steps):
            v = velocity(x.detach() if detach_input else x, sigmas[i])
        x = euler_step(x, v, sigmas[i], sigmas[i + 1])
    return x


def velocity_field(
    transformer: Callable,
    cond: Conditioning,
    guidance_scale: float,
    gradient: str = "full",
    together: bool = False,
) -> Velocity:
    """The guided velocity v_neg + g (v_text - v_neg) of a batch (arXiv 2207.12598), and what of it carries gradient.

    gradient:
        "full": both branches. Exact.
        "text": v_text, g times; v_neg is a constant. Not exact: the gradient g J_text - (g - 1) J_neg loses a part.
        "none": v_text, once; guidance is a constant that is added. Not exact.
        "distill": there is no guidance: v_text alone, exact for an adapter taught guidance (docs/methods.md).
    together: both branches in one batch, where both are run alike.
    """

    def whole(x, sigma):
        return guided_velocity(transformer, x, sigma, cond, guidance_scale, together=together)

    def text_only(x, sigma):
        return guided_velocity(transformer, x, sigma, cond, 1.0)

    def one_sided(x, sigma):
        if not torch.is_grad_enabled():
            return whole(x, sigma)
        v_text = text_only(x, sigma)
        with torch.no_grad():
            v_neg = guided_velocity(transformer, x, sigma, cond.negative, 1.0)
        return v_text + (guidance_scale - 1) * ((v_text.detach() if gradient == "none" else v_text) - v_neg)

    if gradient == "distill":
        return text_only
    return whole if gradient == "full" or guidance_scale <= 1 else one_sided


class Visited:
    """A velocity field that keeps the state of its call number `keep` (from 0; None: of none), without gradient."""

    def __init__(self, velocity: Velocity, keep: int | None):
        self.velocity, self.keep, self.calls = velocity, keep, 0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if self.calls == self.keep:
            self.state = x.detach(), sigma
        self.calls += 1
        return self.velocity(x, sigma)


def draw_noise(shape_CTHW: tuple[int, int, int, int], seed: int, purpose: str, samples: list[tuple]) -> torch.Tensor:
    """Unit normal noise (B, C, T, H, W), float32 on the CPU; sample i's comes from (purpose, seed, *samples[i]) alone.

    So a sample's noise is the same on every device, in every batch and on every number of processes.
    """
    draws = (torch.randn(shape_CTHW, generator=generator(purpose, seed, *key)) for key in samples)
    return torch.stack(list(draws))
