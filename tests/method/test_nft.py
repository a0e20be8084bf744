"""DiffusionNFT: its loss in closed form, its fixed point on a Gaussian, and whole runs."""

import re

import numpy as np
import pytest
import torch
from problem import GUIDANCE, SIGMAS
from runs import train
from toy_rewards import count

from rewards import RewardError
from rlhf.config import ConfigError
from rlhf.method.nft import NFT, advantages, nft_loss, optimality
from rlhf.method.regression import ScoredRollout
from rlhf.method.velocity import velocity_field

GROUPS = {"method": "nft", "method_kwargs": {"group_size": 2, "num_levels": 2}}


def test_scores_count_relative_to_their_group_and_equal_ones_teach_nothing():
    scores = torch.tensor([1.0, 3.0, 7.0, 7.0])
    torch.testing.assert_close(advantages(scores, 2), torch.tensor([-1.0, 1.0, 0.0, 0.0]), rtol=1e-3, atol=0)
    torch.testing.assert_close(optimality(scores, 2, clip=2.0), torch.tensor([0.25, 0.75, 0.5, 0.5]), rtol=1e-3, atol=0)
    assert optimality(scores, 2, clip=0.5)[:2].tolist() == [0.0, 1.0]


def test_the_loss_has_the_written_out_value_and_gradient():
    torch.manual_seed(0)
    v, v_old, target = torch.randn(3, 2, 1, 2, 2, 2, dtype=torch.float64)
    v.requires_grad_()
    r, beta = torch.tensor([0.2, 0.9], dtype=torch.float64), 0.7
    loss = nft_loss(v, v_old, target, r, beta)
    better, worse = (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v
    of_video = lambda x: x.square().flatten(1).mean(1)
    torch.testing.assert_close(loss, (r * of_video(better - target) + (1 - r) * of_video(worse - target)) / beta)
    (gradient,) = torch.autograd.grad(loss.sum(), v)
    by_hand = 2 / 8 * (beta * (v - v_old) - (2 * r - 1).view(-1, 1, 1, 1, 1) * (target - v_old))
    torch.testing.assert_close(gradient, by_hand.detach())


def test_a_linear_reward_moves_the_mean_of_a_gaussian_as_the_theory_says():
    """At level s the minimum is v_old - 2 c s / (beta w), w = (1 - s)^2 + s^2, for r = 1/2 + c x0.

    The videos are those of N(0, 1), by quadrature. The mean m of the minimum's flow obeys
    dm/ds = (2 s - 1) / w m - 2 c s / (beta w) from m(1) = 0, whose solution ends at 2 c / beta.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(24)
    points, weights = (torch.tensor(values, dtype=torch.float64) for values in (points, weights / weights.sum()))
    x0, e = (grid.flatten().view(-1, 1, 1, 1, 1) for grid in torch.meshgrid(points, points, indexing="ij"))
    weight = (weights[:, None] * weights).flatten()
    c, beta, sigmas = 0.05, 0.5, torch.linspace(1, 0, 101, dtype=torch.float64)
    moved = 0.0
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        x, variance = (1 - sigma) * x0 + sigma * e, (1 - sigma) ** 2 + sigma**2
        v_old = (2 * sigma - 1) / variance * x  # E[e - x0 | x]
        shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
        loss = (weight * nft_loss(v_old + shift, v_old, e - x0, 0.5 + c * x0.flatten(), beta)).sum()
        slope = torch.autograd.grad(loss, shift)[0]
        least = -slope / (2 * beta)  # the loss is a parabola of curvature 2 beta
        torch.testing.assert_close(least, -2 * c * sigma / (beta * variance), rtol=1e-8, atol=1e-12)
        moved = moved + (after - sigma) * ((2 * sigma - 1) / variance * moved + least)
    assert moved == pytest.approx(2 * c / beta, rel=0.02)


def test_its_gradient_on_the_tiny_model_is_that_of_autograd_and_finite_differences(problem):
    tuned = velocity_field(problem.transformer, problem.cond, GUIDANCE)
    nft = NFT(group_size=2, levels=[SIGMAS[0], SIGMAS[2]], beta=0.7, clip=5.0)
    scores = torch.tensor([0.3, 1.0], dtype=torch.float64)
    noises = {f"level {i}": torch.randn_like(problem.noise) for i in range(2)}
    x0 = torch.randn_like(problem.noise)
    base = problem.masters.vector.detach() * 0.5

    @torch.no_grad()
    def old(x, sigma):
        with problem.masters.use(base):
            return tuned(x, sigma)

    def losses():
        return nft.losses(ScoredRollout([x0], SIGMAS, scores, None, noises.__getitem__, tuned, old, None))

    for loss in losses():
        loss.mean().backward()
    gradient = problem.collect()
    direction = torch.randn_like(gradient)
    step, ends = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad(), problem.masters.use(problem.masters.vector.detach() + sign * step * direction):
            ends.append(sum(loss.mean().item() for loss in losses()))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient @ direction), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"per_device_train_batch_size": 3}, "expected a multiple of that"),
        ({"drift_weight": 1.0}, "drift_weight: got 1.0 with method nft"),
        ({"method_kwargs": {"num_levels": 99}}, "num_levels: got 99"),
    ],
)
def test_what_does_not_fit_is_refused(make_args, settings, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        train(make_args(**GROUPS | settings), count)


def test_a_gradient_method_refuses_the_reward_and_names_nft(make_args):
    with pytest.raises(RewardError, match="--method nft"):
        train(make_args(), count)
