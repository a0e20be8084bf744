"""LeapAlign: the reward's gradient through two leaps along a no-grad rollout (arXiv 2604.15311).

Of a rollout's states two are drawn: x_k and the later x_j. A leap is one Euler step over all steps
between (eq. 4 and 5):

    leap_j = x_k - (s_k - s_j) v(x_k),    leap_0 = x_j - s_j v(x_j).

The values are those of the rollout, which is what is decoded and scored; the gradient is that of
the leaps (eq. 6 and 7). So every step of the sampler can learn, at two velocities with gradient.
"""

from dataclasses import dataclass

import torch

from rlhf.generator.flow import euler_step
from rlhf.method.options import LeapAlignOptions
from rlhf.method.rollout import Velocity


@dataclass(frozen=True)
class Leaps:
    """Two leaps of one optimizer step, the same on all processes."""

    start: int  # k, the index of the state at which the first leap starts
    middle: int  # j, where the first leap ends and the second one starts
    discount: float  # factor of the gradient through the second leap's input
    tolerance: float  # distance from the rollout below which the leaps have full weight

    def connect(self, velocity: Velocity, states: list[torch.Tensor], sigmas: torch.Tensor) -> torch.Tensor:
        """Return the rollout's last state (B, C, T, H, W) with the weighted gradient of the leaps.

        The weight of a sample is 2 t / (max(d_j, t) + max(d_0, t)), with d the mean distance of a
        leap's end from the rollout and t the tolerance (eq. 12, but for the constant 2 t, which
        makes the largest weight 1).
        """
        x_k, x_j, x0 = states[self.start], states[self.middle], states[-1]
        s_k, s_j, s_0 = sigmas[self.start], sigmas[self.middle], sigmas[-1]
        leap_j = euler_step(x_k, velocity(x_k, s_k), s_k, s_j)
        moved_j = leap_j - leap_j.detach()  # zero, with the gradient of the first leap
        leap_0 = euler_step(x_j + moved_j, velocity(x_j + self.discount * moved_j, s_j), s_j, s_0)
        far_B = sum(self._distance(*pair) for pair in ((leap_j, x_j), (leap_0, x0)))
        weight_B = 2 * self.tolerance / far_B
        return x0 + weight_B.view(-1, 1, 1, 1, 1) * (leap_0 - leap_0.detach())

    def _distance(self, leap: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Return the mean absolute difference (B,) without gradient, at least the tolerance."""
        return (leap.detach() - state).abs().mean((1, 2, 3, 4)).clamp(min=self.tolerance)


def draw_leaps(options: LeapAlignOptions, num_steps: int, rng: torch.Generator) -> Leaps:
    """Draw two different steps of the sampler, all pairs equally likely."""
    start, middle = sorted(torch.randperm(num_steps, generator=rng)[:2].tolist())
    return Leaps(start, middle, options.leap_discount, options.leap_tolerance)
