"""Flow matching on real videos: its gradient as a number, its noise levels, its optimum."""

import math

import pytest
import torch
from problem import GUIDANCE

from rlhf.method.flow_matching import draw_sigmas, flow_matching_loss
from rlhf.method.velocity import Guidance, VelocityFields


def test_the_toys_gradient_is_the_closed_form():
    """Of v = theta (1 + s) x, at two levels in one batch."""
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x0, e = torch.randn(2, 2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = torch.tensor([0.3, 0.9], dtype=torch.float64)
    loss_B = flow_matching_loss(lambda x, s: theta * (1 + s.view(-1, 1, 1, 1, 1)) * x, x0, e, levels)
    loss_B.mean().backward()
    expected = 0.0
    for i, s in enumerate(levels.tolist()):
        rate_x = (1 + s) * ((1 - s) * x0[i] + s * e[i])
        error = 0.7 * rate_x - (e[i] - x0[i])
        assert loss_B[i].item() == pytest.approx((error**2).mean().item(), rel=1e-12)
        expected += (2 * error * rate_x).mean().item() / 2
    assert theta.grad.item() == pytest.approx(expected, rel=1e-12)


def test_the_models_gradient_is_that_of_finite_differences_and_without_guidance(problem):
    """A batch's levels differ; the negative prompt has no say."""
    fields = VelocityFields(problem.transformer, problem.masters, Guidance(GUIDANCE))
    cond, masters = problem.cond, problem.masters
    x0, generator = problem.noise.flip(0) * 0.5, torch.Generator().manual_seed(2)
    levels = torch.tensor([0.4, 0.85], dtype=torch.float64)
    loss = lambda cond: flow_matching_loss(fields.unguided(cond), x0, problem.noise, levels)
    loss(cond).mean().backward()
    gradient = problem.collect()
    direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
    direction /= direction.norm()
    with torch.no_grad():
        values, start, size = [], masters.vector.clone(), 1e-4
        for shift in (size, -size):
            masters.vector.copy_(start + shift * direction)
            masters.write()
            values.append(loss(cond).mean().item())
        masters.vector.copy_(start)
        masters.write()
        found = (values[0] - values[1]) / (2 * size)
        assert found == pytest.approx((gradient @ direction).item(), rel=1e-5)
        assert abs(found) > 1e-4
        one_by_one = [fields.unguided(cond)(problem.noise, level) for level in levels]
        both = fields.unguided(cond)(problem.noise, levels)
        for i, v in enumerate(one_by_one):
            torch.testing.assert_close(both[i], v[i], rtol=1e-9, atol=1e-12)
        cond.negative_embeds_BLD.mul_(2)
        assert loss(cond).mean().item() == pytest.approx(sum(values) / 2, rel=1e-6)


def test_levels_are_the_shifted_logit_normal():
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = draw_sigmas(normal, shift=3.0)
    # The shift multiplies the odds s / (1 - s), so that their logarithm is normal around log 3.
    odds = (sigma / (1 - sigma)).log()
    torch.testing.assert_close(odds, normal + math.log(3.0))
    assert odds.mean().item() == pytest.approx(math.log(3.0), abs=0.03)
    assert 0 < sigma.min() < 0.1 < 0.99 < sigma.max() < 1
