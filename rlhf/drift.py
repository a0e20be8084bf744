"""How far the tuned model has moved from its base: the distance of their velocities, weighted as a KL divergence.

The flow dx/dsigma = v has the same marginals as the stochastic process with drift v + (G/2) score and noise G, for any
G(sigma). By Girsanov's theorem two such processes differ by KL = 1/2 integral of (1 + G a)^2 / G |v - v_base|^2 dsigma,
with a = (1 - sigma) / (2 sigma), since the score is -(x + (1 - sigma) v) / sigma. Of all G, 1/a makes it least:

    KL = integral over sigma of (1 - sigma) / sigma |v - v_base|^2,

an upper bound on the KL divergence of the videos. docs/methods.md derives it step by step.
"""

import torch

from rlhf.sampler import Velocity


def step_weights(sigmas: torch.Tensor, weighting: str) -> torch.Tensor:
    """What each of N steps counts, (N,): |sigma_i - sigma_i+1| for "even", times (1 - s) / s for "kl".

    s is the middle of the step, where the weight is finite in the first step and the last.
    """
    length, middle = sigmas[:-1] - sigmas[1:], (sigmas[:-1] + sigmas[1:]) / 2
    return length if weighting == "even" else length * (1 - middle) / middle


def velocity_distance(tuned: Velocity, base: Velocity, x_BCTHW: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """(B,) mean square difference of the two velocities at a state; gradient through `tuned` alone.

    Times `Plan.drift_total` it estimates the KL divergence in nats an element of the latents, without bias where x is
    the state of a step drawn by `step_weights`: of the tuned model from the base on the tuned model's own rollouts,
    of the base from the tuned model on the base's. How a state depends on the adapter is left out.
    """
    with torch.no_grad():
        v_base = base(x_BCTHW, sigma)
    return (tuned(x_BCTHW, sigma) - v_base).square().mean((1, 2, 3, 4))
