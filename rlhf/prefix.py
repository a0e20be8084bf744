"""Cheaper ways to the window that the gradient runs through. None is exact: each changes the videos that are scored.

Most of a full-size step are the denoising steps before the window. Fewer or second-order steps, guidance
kept over neighbouring steps, and a window's start used for several optimizer steps save them. Each takes effect only
where no gradient is recorded, so the window's own gradient stays that of the state it starts from.

Shape legend: B batch, C channels, T latent frames, H W latent height and width, N denoising steps.
"""

from collections.abc import Callable, Hashable

import torch

from rlhf.contentv.flow import guided_velocity
from rlhf.sampler import Velocity
from rlhf.types import Conditioning


def fewer_steps(sigmas: torch.Tensor, window: int, steps: int) -> torch.Tensor:
    """Noise levels whose first `window` steps are only `steps`, between levels of the (N+1,) given ones, evenly chosen.

    The window, from step number `window` on, is as it was; it starts at step number `steps` now.
    """
    if not 1 <= steps <= window:
        raise ValueError(f"prefix_steps={steps}, expected 1 to {window}, the steps before the window; correct it")
    kept = torch.linspace(0, window, steps + 1).round().long()
    return torch.cat([sigmas[kept.to(sigmas.device)], sigmas[window + 1 :]])


class SecondOrder:
    """A velocity that makes one rollout's Euler steps second-order, without a further evaluation.

    Adams-Bashforth with steps h of any length (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I,
    III.5): (1 + r/2) v_n - r/2 v_n-1 with r = h_n / h_n-1; the first step stays Euler's, and so do those
    with gradient.
    """

    def __init__(self, velocity: Velocity, sigmas: torch.Tensor):
        self.velocity, self.lengths, self.calls, self.before = velocity, sigmas.diff(), 0, None

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        v, number = self.velocity(x, sigma), self.calls
        self.calls += 1
        if torch.is_grad_enabled():
            return v
        before, self.before = self.before, v
        if before is None:
            return v
        ratio = self.lengths[number] / self.lengths[number - 1]
        return v + ratio / 2 * (v - before)


class KeptGuidance:
    """The guided velocity of one rollout, whose direction v_text - v_neg is computed at every `every`-th step only.

    v = v_text + (g - 1) (v_text - v_neg), the second part as it was at the last step that computed it: the negative
    branch is run once in `every` steps. With gradient, both are computed.
    """

    def __init__(self, transformer, cond: Conditioning, guidance_scale: float, every: int):
        if every < 1:
            raise ValueError(f"guidance_every={every}, expected at least 1; raise it")
        self.transformer, self.cond, self.guidance_scale, self.every = transformer, cond, guidance_scale, every
        self.calls, self.direction = 0, None

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or self.guidance_scale <= 1:
            return guided_velocity(self.transformer, x, sigma, self.cond, self.guidance_scale)
        v_text = guided_velocity(self.transformer, x, sigma, self.cond, 1.0)
        if self.calls % self.every == 0:
            self.direction = v_text - guided_velocity(self.transformer, x, sigma, self.cond.negative, 1.0)
        self.calls += 1
        return v_text + (self.guidance_scale - 1) * self.direction


def by_gradient(window: Velocity, prefix: Velocity) -> Velocity:
    """`window` where a gradient is recorded, `prefix` elsewhere."""

    def velocity(x, sigma):
        return (window if torch.is_grad_enabled() else prefix)(x, sigma)

    return velocity


class PrefixBuffer:
    """Where windows start, (B, C, T, H, W), each made once and used for `uses` optimizer steps in a row.

    The gradient of each use is that of the adapter of that step from the given start on; the start itself is up to
    uses - 1 steps old. A buffer is not part of a checkpoint: a resumed run makes the starts in use anew.
    """

    def __init__(self, uses: int):
        if uses < 1:
            raise ValueError(f"rollout_reuse={uses}, expected at least 1; raise it")
        self.uses, self.starts = uses, {}

    def rollout_of(self, step: int, micro: int) -> int:
        """Which rollout batch number `micro` of a step uses. Batches change one after the other, not all in a step."""
        return (step + micro % self.uses) // self.uses

    def start(self, step: int, micro: int, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Where that rollout's window starts; make() is called the first time."""
        key: Hashable = (micro, self.rollout_of(step, micro))
        if self.uses == 1:
            return make()
        if key not in self.starts:
            self.starts = {other: x for other, x in self.starts.items() if other[0] != micro}
            self.starts[key] = make()
        return self.starts[key]
