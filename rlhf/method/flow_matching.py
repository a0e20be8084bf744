"""Flow matching on real videos, as the generator was trained (arXiv 2210.02747).

    L = E |v(x_s, s, caption) - (e - x0)|^2, x_s = (1 - s) x0 + s e

for real latents x0 and noise e (eq. 23). Its minimum is the velocity of the videos' distribution:
descending it minimises KL(videos || tuned), up to the weight of each noise level.

Shape legend: B batch, C channels, T latent frames, H W latent height and width.
"""

import torch

from rlhf.method.rollout import Velocity


def draw_sigmas(normal_B: torch.Tensor, shift: float) -> torch.Tensor:
    """Return noise levels (B,) in (0, 1) of unit normal draws: logit-normal, then shifted.

    This is how nano was trained, after SD3 (arXiv 2403.03206, eq. 19 and 23). shift: that of the
    scheduler. The published generators come without training code.
    """
    u_B = normal_B.sigmoid()
    return shift * u_B / (1 + (shift - 1) * u_B)


def flow_matching_loss(
    velocity: Velocity, x0_BCTHW: torch.Tensor, noise_BCTHW: torch.Tensor, sigma_B: torch.Tensor
) -> torch.Tensor:
    """Return the squared error (B,) of a velocity without guidance, a mean over latent elements."""
    s = sigma_B.view(-1, 1, 1, 1, 1)
    x_BCTHW = (1 - s) * x0_BCTHW + s * noise_BCTHW
    return (velocity(x_BCTHW, sigma_B) - (noise_BCTHW - x0_BCTHW)).square().mean((1, 2, 3, 4))
