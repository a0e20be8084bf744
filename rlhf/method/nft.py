"""DiffusionNFT: learn from scores alone, without a gradient of the reward (arXiv 2509.16117).

A group of videos of one prompt is sampled by an older policy. Each video is noised again to drawn
levels, and the velocity is trained by regression there: towards a video that is better than its
group, away from one that is worse. Neither the sampler nor its likelihood matters.

Shape legend: B batch, C channels, T latent frames, H W latent height and width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rlhf.method.regression import Regression, ScoredRollout

LEAST_SPREAD = 1e-4  # added to a group's standard deviation, so that equal scores teach nothing


def advantages(scores_B: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return scores (B,) less the mean of their group, over its spread; neighbours are a group."""
    groups = scores_B.view(-1, group_size)
    spread = groups.std(1, keepdim=True, correction=0) + LEAST_SPREAD
    return ((groups - groups.mean(1, keepdim=True)) / spread).flatten()


def optimality(scores_B: torch.Tensor, group_size: int, clip: float) -> torch.Tensor:
    """Return how likely each video is a good one of its group, (B,) in [0, 1]; 1/2 is the mean.

    Advantages beyond +-clip, in spreads of the group, count as 0 or 1.
    """
    return 0.5 + 0.5 * (advantages(scores_B, group_size) / clip).clamp(-1, 1)


def nft_loss(v: torch.Tensor, v_old: torch.Tensor, target: torch.Tensor, r_B: torch.Tensor, beta: float):
    """Return the loss (B,) of velocities (B, C, T, H, W) at one noise level (eq. 5 of the paper).

    With v+ = v_old + beta (v - v_old) and v- = v_old - beta (v - v_old) it is the mean over
    elements of r |v+ - target|^2 + (1 - r) |v- - target|^2, over beta. Only v has a gradient.
    Its minimum is v_old + 2 / beta Cov(r, target | x).
    """
    moved = beta * (v - v_old)
    better_B = (v_old + moved - target).square().flatten(1).mean(1)
    worse_B = (v_old - moved - target).square().flatten(1).mean(1)
    return (r_B * better_B + (1 - r_B) * worse_B) / beta


@dataclass(frozen=True)
class NFT(Regression):
    """The regression of one optimizer step, the same on all processes."""

    group_size: int
    levels: list[torch.Tensor]  # noise levels of the sampler, drawn for this step
    beta: float
    clip: float

    def losses(self, rollout: ScoredRollout) -> Iterator[torch.Tensor]:
        """Yield `nft_loss` (B,) / num_levels at each noise level, with noise of its own."""
        x0_BCTHW = rollout.states[-1]
        r_B = optimality(rollout.scores_B, self.group_size, self.clip)
        for number, sigma in enumerate(self.levels):
            e = rollout.noise(f"level {number}")
            x = (1 - sigma) * x0_BCTHW + sigma * e
            v_old = rollout.old(x, sigma)  # before there is a graph of the weights
            yield nft_loss(rollout.tuned(x, sigma), v_old, e - x0_BCTHW, r_B, self.beta) / len(self.levels)
