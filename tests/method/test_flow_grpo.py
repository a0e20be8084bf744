"""Flow-GRPO: its densities in closed form, its gradient against the expected reward, and runs."""

import math
import re

import pytest
import torch
from problem import GUIDANCE
from problem import SIGMAS as THREE_STEPS
from runs import train
from toy_rewards import count

from rlhf.adapter.lora import disable_adapter
from rlhf.config import ConfigError
from rlhf.device import generator
from rlhf.method.flow_grpo import MOMENTS, FlowGRPO, cps_moments, log_density, sample_stochastic, sde_moments
from rlhf.method.nft import advantages
from rlhf.method.regression import ScoredRollout
from rlhf.method.velocity import velocity_field

SIGMAS = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0], dtype=torch.float64)  # nano's
GROUPS = {"method": "flow_grpo", "method_kwargs": {"group_size": 2, "kl_weight": 0.04}}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", MOMENTS)
def test_log_densities_are_those_of_the_normal_distribution(name):
    x, v, fresh = (normal(2, 3, 4, 2, 2, seed=s) for s in range(3))
    mean, std = MOMENTS[name](x, v, SIGMAS, 1, 0.7)
    after = mean + std * fresh
    expected = torch.distributions.Normal(mean, std).log_prob(after).flatten(1).mean(1)
    assert torch.allclose(log_density(after, mean, std), expected, rtol=1e-12)


def test_an_sde_step_is_the_published_equation():
    x, v = normal(2, 3), normal(2, 3, seed=1)
    for i, denominator in ((0, 0.1), (1, 0.1), (2, 0.25)):  # 1 - sigma; at sigma 1 that of the next level
        t, dt = SIGMAS[i].item(), (SIGMAS[i + 1] - SIGMAS[i]).item()
        s = 0.7 * math.sqrt(t / denominator)
        mean, std = sde_moments(x, v, SIGMAS, i, 0.7)
        shrunk = x * (1 + s**2 / (2 * t) * dt) + v * (1 + s**2 * (1 - t) / (2 * t)) * dt
        assert torch.allclose(mean, shrunk, rtol=1e-12)
        assert std.item() == pytest.approx(s * math.sqrt(-dt))


def test_a_cps_step_leaves_as_much_noise_as_the_flow_has():
    x0, e = normal(2, 3), normal(2, 3, seed=1)
    t, after = SIGMAS[1], SIGMAS[2]
    mean, std = cps_moments((1 - t) * x0 + t * e, e - x0, SIGMAS, 1, 0.4)
    assert torch.allclose(mean, (1 - after) * x0 + (after**2 - std**2).sqrt() * e)
    assert 0 < std < after


@pytest.mark.parametrize(("name", "level"), [("sde", 0.5), ("cps", 0.05)])
def test_samples_of_many_stochastic_steps_have_the_datas_distribution(name, level):
    """Data of N(0.5, 0.3^2), whose exact velocity is known: noise must not change what is sampled.

    The noise of "cps" is by step, not by time: of short steps little is the same.
    """
    m, s = 0.5, 0.3

    def velocity(x, t):
        mean_x, var_x = (1 - t) * m, (1 - t) ** 2 * s**2 + t**2
        scaled = (x - mean_x) / var_x
        return (0 + t * scaled) - (m + (1 - t) * s**2 * scaled)  # E[e | x] - E[x0 | x]

    states = sample_stochastic(
        velocity,
        lambda purpose: torch.randn(20_000, 1, generator=generator(purpose), dtype=torch.float64),
        torch.linspace(1, 0, 201, dtype=torch.float64),
        name,
        level,
    )
    assert states[-1].mean().item() == pytest.approx(m, abs=0.01)
    assert states[-1].std().item() == pytest.approx(s, abs=0.01)
    assert len(states) == 201


@pytest.mark.parametrize("kind", MOMENTS)
def test_its_gradient_on_the_tiny_model_is_that_of_finite_differences(problem, kind):
    """The loss is written out anew with torch's normal distributions and their KL divergence."""
    scores = torch.tensor([0.3, 1.0], dtype=torch.float64)
    tuned = velocity_field(problem.transformer, problem.cond, GUIDANCE)
    base = disable_adapter(problem.transformer)(tuned)
    grpo = FlowGRPO(group_size=2, kind=kind, level=0.6, kl_weight=0.5, clip=5.0)
    noise = lambda purpose: torch.randn(problem.noise.shape, generator=generator(purpose), dtype=torch.float64)
    states = grpo.sample(tuned, noise, THREE_STEPS)

    @torch.no_grad()
    def base_vjp(x, sigma, a):
        assert a is None
        return base(x, sigma), None

    for loss_B in grpo.losses(ScoredRollout(states, THREE_STEPS, scores, None, noise, tuned, None, base_vjp)):
        loss_B.mean().backward()
    gradient = problem.collect()

    @torch.no_grad()
    def loss_at(shift) -> float:
        with problem.masters.use(problem.masters.vector.detach() + shift):
            total = 0.0
            for i in (0, 1):
                x, sigma = states[i], THREE_STEPS[i]
                pair = (MOMENTS[kind](x, of(x, sigma), THREE_STEPS, i, 0.6) for of in (tuned, base))
                ours, theirs = (torch.distributions.Normal(mean, std) for mean, std in pair)
                density_B = ours.log_prob(states[i + 1]).mean((1, 2, 3, 4))
                far_B = torch.distributions.kl_divergence(ours, theirs).mean((1, 2, 3, 4))
                total += (0.5 * far_B - advantages(scores, 2) * density_B).mean().item() / 2
            return total

    direction = normal(*gradient.shape, seed=3)
    up, down = loss_at(1e-6 * direction), loss_at(-1e-6 * direction)
    assert (up - down) / 2e-6 == pytest.approx(float(gradient @ direction), rel=1e-6)


def linear(theta):
    """v = a x + b, the same at every level."""
    return lambda x, sigma: theta[0] * x + theta[1]


def expected_reward(theta, last, moments, level) -> float:
    """Return E[-(x - 1)^2] at the end, exactly: a linear flow keeps states normal."""
    mean, variance = torch.zeros(1, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for i in range(len(SIGMAS) - 2):
        offset, std = moments(mean, linear(theta)(mean, None), SIGMAS, i, level)
        one, _ = moments(mean + 1, linear(theta)(mean + 1, None), SIGMAS, i, level)
        mean, variance = offset, (one - offset) ** 2 * variance + std**2
    step = SIGMAS[-1] - SIGMAS[-2]
    mean, variance = mean + step * linear(last)(mean, None), (1 + step * last[0]) ** 2 * variance
    return (-((mean - 1) ** 2) - variance).item()


@pytest.mark.parametrize("kind", MOMENTS)
def test_it_ascends_the_expected_reward(kind):
    """Against its finite differences; the noiseless last step learns nothing and is held fixed."""
    theta, count, clip = torch.tensor([0.3, -0.4], dtype=torch.float64), 400_000, 1e9
    trained = theta.clone().requires_grad_()
    grpo = FlowGRPO(group_size=count, kind=kind, level=0.6, kl_weight=0.0, clip=clip)

    def noise(purpose):
        half = torch.randn(count // 2, 1, generator=generator(purpose), dtype=torch.float64)
        return torch.cat([half, -half])  # antithetic: half of the error

    states = grpo.sample(linear(theta), noise, SIGMAS)
    scores = -((states[-1][:, 0] - 1) ** 2)
    steps = grpo.losses(ScoredRollout(states, SIGMAS, scores, None, noise, linear(trained), None, None))
    (-3 * scores.std(correction=0) * sum(loss_B.mean() for loss_B in steps)).backward()  # advantages in spreads
    h, expected = 1e-5, []
    for way in torch.eye(2, dtype=torch.float64) * h:
        up, down = (expected_reward(theta + sign * way, theta, MOMENTS[kind], 0.6) for sign in (1, -1))
        expected.append((up - down) / (2 * h))
    assert trained.grad.tolist() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"per_device_train_batch_size": 3}, "expected a multiple of that"),
        ({"method_kwargs": {"noise": "ode"}}, "noise: got 'ode'"),
        ({"drift_weight": 1.0}, "drift_weight: got 1.0 with method flow_grpo"),
    ],
)
def test_what_does_not_fit_is_refused(make_args, settings, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        train(make_args(**GROUPS | settings), count)
