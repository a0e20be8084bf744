"""What a method learns from by regression: a scored no-grad rollout, and the velocities at a state.

The method yields loss terms, each of which evaluates one velocity with gradient. The trainer
back-propagates it at once, so that memory is that of one step, whatever the number of terms is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from rlhf.method.rollout import Velocity, sample_euler

# (x_BCTHW, sigma, a_BCTHW) -> the velocity v and J^T a, J = dv/dx; a = None leaves J^T a out
VelocityVJP = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class ScoredRollout:
    """A batch's rollout by the old policy, its scores, and its velocities."""

    states: list[torch.Tensor]  # x_0 (noise) .. x_N (video), (B, C, T, H, W) each
    sigmas: torch.Tensor  # (N+1,) from 1 to 0
    scores_B: torch.Tensor
    gradient: torch.Tensor | None  # of each score at its x_N; None for a method of `SCORES_ALONE`
    noise: Callable[[str], torch.Tensor]  # purpose -> unit normal noise (B, C, T, H, W), by sample
    tuned: Velocity  # of the current model, with gradient
    old: Velocity  # of the old policy, which changes the weights while it runs
    base_vjp: VelocityVJP  # of the base


class Regression(Protocol):
    """The rollout and loss of a method, made by `make_plan` for one optimizer step."""

    def sample(
        self, velocity: Velocity, noise: Callable[[str], torch.Tensor], sigmas: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return the states of a no-grad rollout; arguments and states as in `ScoredRollout`."""
        return sample_euler(velocity, noise("train"), sigmas)

    def losses(self, rollout: ScoredRollout) -> Iterator[torch.Tensor]:
        """Yield loss terms (B,), whose sum is minimised; each is back-propagated at once."""
        ...
