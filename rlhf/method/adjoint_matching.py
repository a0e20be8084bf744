"""Adjoint matching, deterministic (arXiv 2605.06583): regress the velocity on the optimal control.

With v = v_base + u, the tuned sampler is to maximise

    E[R(x_N)] - 1 / (2 c) sum over steps of |h_i| |u(x_i)|^2,    h_i = sigma_i+1 - sigma_i < 0,

where |.|^2 is a mean over the n latent elements and c is `reward_scale`. Let a_i be the gradient of
R(x_N) at x_i along the rollout. Pontryagin's principle says that at the optimum

    u(x_i) = -c n a_i+1,    a_N = dR/dx_N,    a_i = a_i+1 + h_i J_base(x_i)^T a_i+1.

The terms of J that belong to u cancel against the penalty, so that the adjoint runs under the base
alone ("lean", arXiv 2409.08861, section 5). Both hold for the Euler steps as they are, not only in
the limit of small ones. The loss regresses u on this target at every visited state, which is held
constant.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rlhf.method.regression import Regression, ScoredRollout


@dataclass(frozen=True)
class AdjointMatching(Regression):
    """The loss terms of adjoint matching.

    Args:
        reward_scale: c, the inverse weight of the distance from the base.
        last_steps: the steps, from the last one back, that the adjoint visits and that are trained.
    """

    reward_scale: float
    last_steps: int

    def losses(self, rollout: ScoredRollout) -> Iterator[torch.Tensor]:
        """Yield |h_i| / (2 c) |u(x_i) + c n a_i+1|^2 (B,), last step first.

        With u = 0 the sum's gradient is that of -R through the last steps, so equal to DRaFT-K's.
        """
        a, c, num_steps = rollout.gradient, self.reward_scale, len(rollout.sigmas) - 1
        assert 1 <= self.last_steps <= num_steps, (self.last_steps, num_steps)
        first = num_steps - self.last_steps
        for i in reversed(range(first, num_steps)):
            x, sigma, h = rollout.states[i], rollout.sigmas[i], rollout.sigmas[i + 1] - rollout.sigmas[i]
            v_base, pulled = rollout.base_vjp(x, sigma, a if i > first else None)
            target = v_base - c * a[0].numel() * a
            yield -h / (2 * c) * (rollout.tuned(x, sigma) - target).square().mean((1, 2, 3, 4))
            if i > first:
                a = a + h * pulled
