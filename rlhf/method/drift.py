"""The drift of the tuned model from its base: a KL divergence from distances of velocities.

The flow dx/dsigma = v has the same marginals as the stochastic process with drift v + (G/2) score
and noise G, for any G(sigma). By Girsanov's theorem two such processes differ by

    KL = 1/2 integral of (1 + G a)^2 / G |v - v_base|^2 dsigma, a = (1 - sigma) / (2 sigma),

since the score is -(x + (1 - sigma) v) / sigma. G = 1/a gives the smallest KL:

    KL = integral over sigma of (1 - sigma) / sigma |v - v_base|^2,

an upper bound on the KL divergence of the videos. docs/method_formulas.md derives it step by step.
"""

import torch

from rlhf.method.rollout import Velocity


def drift_step_weights(sigmas: torch.Tensor, even: bool = False) -> torch.Tensor:
    """Return each step's weight (N,) in the KL divergence: |sigma_i - sigma_i+1| (1 - s) / s.

    s is the middle of the step, where the weight is finite in the first step and the last. even:
    without (1 - s) / s, where the first steps need it as well: for an adapter that learns guidance,
    and for the negative branch alone.
    """
    length, middle = sigmas[:-1] - sigmas[1:], (sigmas[:-1] + sigmas[1:]) / 2
    return length if even else length * (1 - middle) / middle


def velocity_distance(tuned: Velocity, base: Velocity, x_BCTHW: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference (B,) of two velocities; `tuned` carries the gradient.

    Times `Plan.drift_total` it estimates a KL divergence in nats per latent element. The estimate
    is unbiased if the step of x is drawn in proportion to `drift_step_weights`. On the tuned
    model's own rollouts it is KL(tuned || base), on the base's KL(base || tuned). How x depends on
    the adapter is left out.
    """
    with torch.no_grad():
        v_base = base(x_BCTHW, sigma)
    return (tuned(x_BCTHW, sigma) - v_base).square().mean((1, 2, 3, 4))
