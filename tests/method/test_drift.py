"""The drift is the KL divergence, without bias; its gradient moves the tuned model alone."""

import pytest
import torch
from problem import GUIDANCE, SIGMAS

from rlhf.config import RewardGradientConfig
from rlhf.device import generator
from rlhf.method.drift import drift_step_weights, velocity_distance
from rlhf.method.options import MethodOptions
from rlhf.method.plan import make_plan
from rlhf.method.velocity import Guidance, VelocityFields, velocity_field


def test_weights_by_hand():
    sigmas = torch.tensor([1.0, 0.8, 0.0])
    torch.testing.assert_close(drift_step_weights(sigmas, even=True), torch.tensor([0.2, 0.8]))
    torch.testing.assert_close(drift_step_weights(sigmas), torch.tensor([0.2 * 0.1 / 0.9, 0.8 * 0.6 / 0.4]))


@pytest.mark.parametrize(("spread", "shift"), [(1.0, 0.5), (0.6, 1.0), (2.0, 3.0)])
def test_weighted_velocities_are_the_kl_divergence_of_gaussian_data(spread, shift):
    """N(0, s^2) and N(m, s^2) have flows E[noise - x0 | x]; their divergence is m^2 / (2 s^2)."""

    def velocity(x, sigma, mean):
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        centred = x - (1 - sigma) * mean
        return sigma / variance * centred - mean - (1 - sigma) * spread**2 / variance * centred

    sigmas = torch.linspace(1, 0, 2001, dtype=torch.float64)
    x = torch.randn(3, 1, 1, 1, 1, dtype=torch.float64, generator=generator("kl"))
    distances = []
    for sigma in (sigmas[:-1] + sigmas[1:]) / 2:
        tuned, base = (lambda x, s, m=m: velocity(x, s, m) for m in (shift, 0.0))
        distances.append(velocity_distance(tuned, base, x, sigma))
    divergence = drift_step_weights(sigmas) @ torch.stack(distances)
    assert divergence.tolist() == pytest.approx([shift**2 / (2 * spread**2)] * 3, rel=1e-5)


def test_one_drawn_step_stands_for_all_without_bias():
    """The mean over draws of total weight times distance is the weighted sum of distances."""
    sigmas, distance = torch.tensor([1.0, 0.9, 0.6, 0.0]), torch.tensor([1.0, 20.0, 3.0])
    for gradient, weight, negative in (("full", 0.1, 0), ("distill", 0.1, 0), ("full", 0, 0.1)):
        args = RewardGradientConfig(drift_weight=weight, guidance_gradient=gradient)
        options = MethodOptions(negative_drift_weight=negative)
        plans = [make_plan(args, options, sigmas, generator("drift", draw)) for draw in range(3000)]
        estimate = sum(p.drift_total * distance[p.drift_step].item() for p in plans) / len(plans)
        even = gradient == "distill" or negative > 0
        assert estimate == pytest.approx((drift_step_weights(sigmas, even) @ distance).item(), rel=0.08)
    assert make_plan(RewardGradientConfig(), MethodOptions(), sigmas, generator("drift", 0)).drift_step is None


@pytest.mark.parametrize("branch", ["guided", "negative"])
def test_drift_is_zero_at_the_base_and_its_gradient_that_of_the_tuned_velocity(problem, branch):
    p, sigma = problem, SIGMAS[1]
    fields = VelocityFields(p.transformer, p.masters, Guidance(GUIDANCE))
    tuned, base = fields.negative(p.cond) if branch == "negative" else (fields.window(p.cond), fields.base(p.cond))
    drift_B = velocity_distance(tuned, base, p.noise, sigma)
    assert drift_B.shape == (2,)
    assert (drift_B > 0).all()
    drift_B.mean().backward()
    gradient = p.collect()

    with torch.no_grad():
        v_base = base(p.noise, sigma)
    direction = torch.randn(gradient.shape, generator=generator("drift"), dtype=torch.float64)
    found = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            p.masters.set(p.masters.vector + step * direction)
            found.append((tuned(p.noise, sigma) - v_base).square().mean().item())
            p.masters.set(p.masters.vector - step * direction)
    assert (found[0] - found[1]) / 2e-5 == pytest.approx((gradient @ direction).item(), rel=1e-6)

    rate = torch.ones((), requires_grad=True)
    assert not velocity_distance(base, lambda x, s: rate * x, p.noise, sigma).requires_grad
    unguided = velocity_field(p.transformer, p.cond.negative if branch == "negative" else p.cond, 1.0)
    with torch.no_grad():
        assert torch.equal(tuned(p.noise, sigma), unguided(p.noise, sigma)) == (branch == "negative")

    p.masters.set(torch.zeros_like(p.masters.vector))  # A = B = 0
    assert velocity_distance(tuned, base, p.noise, sigma).tolist() == [0, 0]
