"""Flow-GRPO: a policy gradient through a sampler made stochastic (arXiv 2505.05470).

A sampler of a flow that adds fresh noise at each step gives the step a probability density, that of
a normal distribution. Ascending advantage times log-density makes the steps of better videos more
likely. Advantages are relative to a group of videos of one prompt.

Each rollout serves one update, on the policy that sampled it. PPO's ratio (arXiv 1707.06347) is
then 1, its clip has no effect, and its gradient is that of the log-density.

Shape legend: B batch, C channels, T latent frames, H W latent height and width, N denoising steps.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from rlhf.generator.flow import euler_step
from rlhf.method.nft import advantages
from rlhf.method.regression import Regression, ScoredRollout
from rlhf.method.rollout import Velocity


def sde_moments(x: torch.Tensor, v: torch.Tensor, sigmas: torch.Tensor, i: int, level: float):
    """Return mean and standard deviation of step i by Euler-Maruyama (arXiv 2505.05470, eq. 9).

    x' = x + [v + s^2 / (2 t) (x + (1 - t) v)] dt + s sqrt(|dt|) noise at t = sigma_i, with s =
    level sqrt(t / (1 - t)). At t = 1, where s has no bound, the next level stands in its
    denominator, as in the published code.
    """
    t, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
    diffusion = level * (t / (1 - (sigmas[1] if t == 1 else t))).sqrt()
    drift = v + diffusion**2 / (2 * t) * (x + (1 - t) * v)
    return x + drift * dt, diffusion * (-dt).sqrt()


def cps_moments(x: torch.Tensor, v: torch.Tensor, sigmas: torch.Tensor, i: int, level: float):
    """Return mean and standard deviation of step i by Flow-CPS (arXiv 2509.05952).

    The fresh noise has the standard deviation t' sin(level pi / 2) at t' = sigma_i+1. The model's
    estimate of the noise in x gives the rest. The state has noise level t' for steps of any length.
    """
    t, after = sigmas[i], sigmas[i + 1]
    std = after * math.sin(level * math.pi / 2)
    return (1 - after) * (x - t * v) + (after**2 - std**2).sqrt() * (x + (1 - t) * v), std


MOMENTS = {"sde": sde_moments, "cps": cps_moments}  # by kind of noise


def log_density(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Return the log-density (B,) of x under N(mean, std^2), as a mean over elements.

    It is a mean, as in the published code, so that it has one scale for videos of any size.
    """
    density = -((x - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
    return density.flatten(1).mean(1)


@torch.no_grad()
def sample_stochastic(
    velocity: Velocity, noise: Callable[[str], torch.Tensor], sigmas: torch.Tensor, kind: str, level: float
) -> list[torch.Tensor]:
    """Return the states of a rollout, from the noise x_0 to the video x_N, (B, C, T, H, W) each.

    All steps but the last are stochastic. The noise of the last one would stay in the video.

    Args:
        velocity: that of the policy.
        noise: purpose -> unit normal noise (B, C, T, H, W).
        sigmas: noise levels (N+1,), from 1 down to 0.
        kind: a key of `MOMENTS`.
        level: strength of the fresh noise; 0 is the deterministic sampler.
    """
    states = [noise("train")]
    for i in range(len(sigmas) - 2):
        x = states[-1]
        mean, std = MOMENTS[kind](x, velocity(x, sigmas[i]), sigmas, i, level)
        states.append(mean + std * noise(f"step {i}"))
    x = states[-1]
    return [*states, euler_step(x, velocity(x, sigmas[-2]), sigmas[-2], sigmas[-1])]


@dataclass(frozen=True)
class FlowGRPO(Regression):
    """The policy gradient of one optimizer step.

    Args:
        group_size: neighbouring videos of one prompt.
        kind, level: the noise, as in `sample_stochastic`.
        kl_weight: weight of a step's KL divergence from the base's, in nats per latent element.
        clip: largest advantage, in spreads of the group.
    """

    group_size: int
    kind: str
    level: float
    kl_weight: float
    clip: float

    def sample(
        self, velocity: Velocity, noise: Callable[[str], torch.Tensor], sigmas: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return the states of a stochastic no-grad rollout, as `sample_stochastic`."""
        return sample_stochastic(velocity, noise, sigmas, self.kind, self.level)

    def losses(self, rollout: ScoredRollout) -> Iterator[torch.Tensor]:
        """Yield the loss (B,) of each stochastic step: -advantage log-density + weight KL."""
        states, sigmas, moments = rollout.states, rollout.sigmas, MOMENTS[self.kind]
        advantages_B = advantages(rollout.scores_B, self.group_size).clamp(-self.clip, self.clip)
        num_stochastic = len(sigmas) - 2
        for i in range(num_stochastic):
            x = states[i]
            v_base = rollout.base_vjp(x, sigmas[i], None)[0] if self.kl_weight else None
            mean, std = moments(x, rollout.tuned(x, sigmas[i]), sigmas, i, self.level)
            loss_B = -advantages_B * log_density(states[i + 1], mean, std)
            if self.kl_weight:
                base_mean, _ = moments(x, v_base, sigmas, i, self.level)
                distance_B = (mean - base_mean).square().flatten(1).mean(1)
                loss_B = loss_B + self.kl_weight * distance_B / (2 * std**2)
            yield loss_B / num_stochastic
