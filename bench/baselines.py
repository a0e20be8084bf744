"""Gradient-free baselines with the same model and reward: policy gradients, and best of n.

Flow-GRPO (arXiv 2505.05470) as in `rlhf.method.flow_grpo`, but with several updates of a rollout,
by PPO's clipped ratio. Relative to the batch it is DDPO (arXiv 2305.13301) for flows.

Shape legend: B batch, C channels, T latent frames, H W latent height and width, N denoising steps.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from rlhf.adapter.optimizer import clip_gradient, learning_rate
from rlhf.device import generator
from rlhf.method.flow_grpo import MOMENTS, log_density, sample_stochastic
from rlhf.method.nft import advantages
from rlhf.method.rollout import Velocity
from rlhf.trainer import RewardGradientTrainer

MAX_ADVANTAGE = 5.0  # as published


@dataclass(frozen=True)
class Policy:
    """Settings of a policy gradient; per_device_train_batch_size is the videos of a rollout."""

    # Videos of one prompt that are compared with each other. 1: all of the batch are, which is
    # DDPO's rule for prompts that it has not seen 16 times. Here none is seen so often.
    group_size: int = 8
    noise: str = "cps"  # how a step is made stochastic: a key of MOMENTS
    noise_level: float = 0.7
    clip_range: float = 1e-3  # of the ratio; that of the published configuration for video
    updates: int = 2  # optimizer updates of a pass, each on its share of the videos
    passes: int = 1  # over the videos of a rollout
    kl_weight: float = 0.0  # of the KL divergence of a step from the base's


# ------------------------------------------------------------------------------ stochastic sampling


@dataclass(frozen=True)
class Trajectory:
    """A stochastic rollout: its states, and the log-probabilities of its steps."""

    states: list[torch.Tensor]  # N+1 of (B, C, T, H, W), noise first
    log_probs: list[torch.Tensor]  # (B,) of each stochastic step

    def rows(self, rows: torch.Tensor) -> "Trajectory":
        """Return the trajectory of some rows."""
        return Trajectory([x[rows] for x in self.states], [p[rows] for p in self.log_probs])


def stochastic_rollout(velocity: Velocity, noise: Callable[[str], torch.Tensor], sigmas, policy: Policy) -> Trajectory:
    """Return a rollout of `sample_stochastic` with the log-densities of its steps."""
    seen, moments = [], MOMENTS[policy.noise]

    def recorded(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(velocity(x, sigma))
        return seen[-1]

    states = sample_stochastic(recorded, noise, sigmas, policy.noise, policy.noise_level)
    means = (moments(states[i], v, sigmas, i, policy.noise_level) for i, v in enumerate(seen[:-1]))
    return Trajectory(states, [log_density(after, *pair) for after, pair in zip(states[1:-1], means, strict=True)])


# ---------------------------------------------------------------------------------- policy gradient


def clipped_loss(new_B: torch.Tensor, old_B: torch.Tensor, advantages_B: torch.Tensor, clip: float) -> torch.Tensor:
    """Return PPO's clipped surrogate (arXiv 1707.06347, eq. 7), to be minimised."""
    ratio_B = (new_B - old_B).exp()
    return -torch.minimum(advantages_B * ratio_B, advantages_B * ratio_B.clamp(1 - clip, 1 + clip)).mean()


def step_losses(
    velocity: Velocity, base: Velocity, path: Trajectory, advantages_B: torch.Tensor, sigmas, policy: Policy
) -> Iterator[torch.Tensor]:
    """Yield the loss of each stochastic step; their mean is the loss of an update."""
    moments = MOMENTS[policy.noise]
    for i, old_B in enumerate(path.log_probs):
        x, after = path.states[i], path.states[i + 1]
        mean, std = moments(x, velocity(x, sigmas[i]), sigmas, i, policy.noise_level)
        loss = clipped_loss(log_density(after, mean, std), old_B, advantages_B, policy.clip_range)
        if policy.kl_weight:
            with torch.no_grad():
                base_mean, _ = moments(x, base(x, sigmas[i]), sigmas, i, policy.noise_level)
            loss = loss + policy.kl_weight * ((mean - base_mean) ** 2).mean() / (2 * std**2)
        yield loss / len(path.log_probs)


class PolicyGradientTrainer(RewardGradientTrainer):
    """The trainer of reward gradients with another step; all else is the same.

    For one process, and per_device_train_batch_size a multiple of group_size. ValueError for
    another.
    """

    def __init__(self, policy: Policy, args, **inputs):
        super().__init__(args=args, **inputs)
        if self.batches.size % policy.group_size:
            raise ValueError(
                f"per_device_train_batch_size={self.batches.size}, expected a multiple of "
                f"group_size={policy.group_size}; change one of them"
            )
        self.policy = policy
        self.batches.group_size = policy.group_size

    def step(self, step: int) -> dict[str, float]:
        """One rollout and the updates on it; returns its metrics. step counts from 0."""
        began, policy = time.perf_counter(), self.policy
        batch = self.batches.batch(step, 0)
        path = stochastic_rollout(
            self.fields.tuned(self.text(batch.prompts, self.device)), batch.noise, self.sigmas, policy
        )
        with torch.no_grad():
            video = self.scorer.decode(path.states[-1], step)
            scores_B, _ = self.rewards(video, batch.prompts, **self.scorer.info(step))
        group = policy.group_size if policy.group_size > 1 else len(scores_B)
        advantages_B = advantages(scores_B, group).clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE)
        rng = generator("updates", self.args.seed, step)
        for _ in range(policy.passes):
            for rows in torch.randperm(len(scores_B), generator=rng).chunk(policy.updates):
                norm = self._update(step, [batch.prompts[i] for i in rows], path, advantages_B, rows.to(self.device))
        return {"step": step + 1, "reward": scores_B.mean().item(), "grad_norm": norm} | {
            "seconds": time.perf_counter() - began
        }

    def _update(self, step: int, prompts: list[str], path: Trajectory, advantages_B, rows: torch.Tensor) -> float:
        """One optimizer update on some videos of a rollout; returns the gradient's norm."""
        cond = self.text(prompts, self.device)
        losses = step_losses(
            self.fields.window(cond),
            self.fields.base(cond),
            path.rows(rows),
            advantages_B[rows],
            self.sigmas,
            self.policy,
        )
        for loss in losses:
            self._back_propagate(loss)
        norm = self.masters.vector.grad.norm().item()
        clip_gradient(self.masters.vector.grad, norm, self.args.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = learning_rate(step, self.args)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.masters.write()
        return norm


# ---------------------------------------------------------------------------------------- best of n


@torch.no_grad()
def best_of(
    count: int,
    make: Callable[[int], torch.Tensor],
    reward: Callable[[torch.Tensor], torch.Tensor],
    report_at: list[int],
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (n, the best videos of the first n samples) for each n of report_at.

    make: number of the sample -> videos (B, 3, T, H, W); reward: videos -> scores (B,), by which
    the best is kept.
    """
    for number in range(count):
        video = make(number)
        scores_B = reward(video)
        if number == 0:
            best, best_B = video, scores_B
        better_B = scores_B > best_B
        best = torch.where(better_B.view(-1, 1, 1, 1, 1), video, best)
        best_B = torch.where(better_B, scores_B, best_B)
        if number + 1 in report_at:
            yield number + 1, best
