"""Adjoint matching: its gradient, its optimum in closed form, the base's adjoint, its memory."""

import pytest
import torch
from problem import GUIDANCE, SIGMAS
from toy_rewards import PROMPTS, redness

from rlhf.method.adjoint_matching import AdjointMatching
from rlhf.method.regression import ScoredRollout
from rlhf.method.rollout import sample_euler
from rlhf.method.velocity import Guidance, VelocityFields
from rlhf.trainer import RewardGradientTrainer


def first_update(make_pipe, make_args, **settings) -> torch.Tensor:
    """The gradient of a first step, at an adapter that changes nothing yet."""
    trainer = RewardGradientTrainer(make_pipe(), redness, make_args(**settings), PROMPTS)
    gradient = []
    trainer._update = lambda step, norm: gradient.append(trainer.masters.vector.grad.clone())
    trainer.step(0)
    return gradient[0]


@pytest.mark.parametrize("steps", [3, 2])
def test_at_the_base_the_gradient_is_that_of_the_last_steps_whatever_the_scale(make_pipe, make_args, steps):
    options = {"adjoint_steps": steps, "reward_scale": 7.0}
    matched = first_update(make_pipe, make_args, method="adjoint_matching", method_kwargs=options)
    exact = first_update(make_pipe, make_args, num_grad_steps=steps)
    torch.testing.assert_close(matched, exact, rtol=1e-3, atol=1e-5 * exact.abs().max().item())
    other = first_update(make_pipe, make_args, num_grad_steps=1)
    assert (other - exact).norm() > 0.05 * exact.norm(), "more steps have to matter"


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_adjoint_is_that_of_the_base_along_the_tuned_rollout(problem, checkpointed):
    """Against autograd through all steps; recomputed blocks, too, must not see the adapter."""
    p, method = problem, AdjointMatching(reward_scale=0.5, last_steps=3)
    fields = VelocityFields(p.transformer, p.masters, Guidance(GUIDANCE), checkpoint_steps=checkpointed)
    tuned, base = fields.tuned(p.cond), fields.base(p.cond)
    states = sample_euler(tuned, p.noise, SIGMAS)

    # From the rollout's own states on, with the gradient of the base's steps.
    leaves, x = [states[0].clone().requires_grad_()], None
    for i in range(3):
        x = leaves[i] + (SIGMAS[i + 1] - SIGMAS[i]) * base(leaves[i], SIGMAS[i])
        leaves.append(x + (states[i + 1] - x).detach())
    adjoints = torch.autograd.grad(-p.loss(leaves[-1]), leaves)

    if checkpointed:
        p.recompute_blocks()
    velocities = []

    def tuned_leaf(x, sigma):
        velocities.append(tuned(x, sigma).detach().requires_grad_())
        return velocities[-1]

    scored = states, SIGMAS, None, adjoints[-1], None
    for term in method.losses(ScoredRollout(*scored, tuned_leaf, None, fields.base_vjp(p.cond))):
        term.sum().backward()
    for i, v in zip((2, 1, 0), velocities, strict=True):
        n, h = v[0].numel(), SIGMAS[i + 1] - SIGMAS[i]
        with torch.no_grad():
            u = v - base(states[i], SIGMAS[i])
        expected = -h / (0.5 * n) * (u + 0.5 * n * adjoints[i + 1])
        torch.testing.assert_close(v.grad, expected, rtol=1e-9, atol=1e-12)
    assert p.collect().abs().max() == 0, "the adjoint asks no gradient of the adapter"


# ---------------------------------------- a Gaussian base and a quadratic reward

LEVELS = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0], dtype=torch.float64)
MEAN, VARIANCE = torch.tensor([[0.5, -1.0], [2.0, 0.3]], dtype=torch.float64)
SHARPNESS, GOAL = torch.tensor([[1.0, 0.4], [2.0, -1.5]], dtype=torch.float64)  # R = -q/2 (x - g)^2, summed
SCALE, SIZE = 0.4, 2


def gaussian_velocity(x, sigma):
    """E[e - x0 | x_s] of data of independent normal elements."""
    slope = (sigma - (1 - sigma) * VARIANCE) / ((1 - sigma) ** 2 * VARIANCE + sigma**2)
    return slope * (x - (1 - sigma) * MEAN) - MEAN


def gaussian_vjp(x, sigma, a):
    x = x.detach().requires_grad_()
    v = gaussian_velocity(x, sigma)
    return v.detach(), None if a is None else torch.autograd.grad(v, x, a)[0]


def optimal_controls() -> tuple[list, list]:
    """Slopes and offsets of u(x) at each step, by dynamic programming (a Riccati recursion).

    The value's derivative after a step is P x + p.
    """
    P, p, slopes, offsets = -SHARPNESS, SHARPNESS * GOAL, [], []
    for sigma, after in reversed(list(zip(LEVELS[:-1], LEVELS[1:], strict=True))):
        h, zero = after - sigma, torch.zeros(2, dtype=torch.float64)
        shift = zero + h * gaussian_velocity(zero, sigma)
        rate = 1 + h * (gaussian_velocity(zero + 1, sigma) - gaussian_velocity(zero, sigma))
        gain = 1 / (1 + h * SCALE * SIZE * P)  # of the value's derivative, since the step is controlled
        slopes.append(-SCALE * SIZE * gain * P * rate)
        offsets.append(-SCALE * SIZE * gain * (P * shift + p))
        P, p = rate**2 * gain * P, rate * gain * (P * shift + p)
    return slopes[::-1], offsets[::-1]


def test_a_gaussian_base_with_a_quadratic_reward_is_tuned_to_the_optimal_control():
    """Newton steps on the method's own loss end at the control that maximises the objective."""
    noise = torch.randn(64, 1, 1, 1, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.zeros(4, 2, SIZE, dtype=torch.float64, requires_grad=True)  # slope and offset of u
    index = {sigma.item(): i for i, sigma in enumerate(LEVELS)}

    def tuned(x, sigma):
        slope, offset = weights[index[sigma.item()]]
        return gaussian_velocity(x, sigma) + slope * x + offset

    method = AdjointMatching(SCALE, last_steps=4)
    for _ in range(40):
        states = sample_euler(tuned, noise, LEVELS)
        gradient = -SHARPNESS * (states[-1] - GOAL)
        rollout = ScoredRollout(states, LEVELS, None, gradient, None, tuned, None, gaussian_vjp)
        for term_B in method.losses(rollout):
            term_B.mean().backward()
        with torch.no_grad():
            for i, x in enumerate(state.view(-1, SIZE) for state in states[:-1]):
                moments = torch.stack([x**2, x, x, torch.ones_like(x)]).mean(1).view(2, 2, SIZE).permute(2, 0, 1)
                curvature = (LEVELS[i] - LEVELS[i + 1]) / (SCALE * SIZE) * moments
                weights[i] -= torch.linalg.solve(curvature, weights.grad[i].T).T
        weights.grad.zero_()
    slopes, offsets = optimal_controls()
    torch.testing.assert_close(weights[:, 0], torch.stack(slopes), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weights[:, 1], torch.stack(offsets), rtol=1e-9, atol=1e-12)

    # So the tuned distribution is the known one: Gaussian, of these means and spreads.
    mean, spread = torch.zeros(SIZE, dtype=torch.float64), torch.ones(SIZE, dtype=torch.float64)
    for i, sigma in enumerate(LEVELS[:-1]):
        step = lambda x, i=i, sigma=sigma: (
            x + (LEVELS[i + 1] - sigma) * (gaussian_velocity(x, sigma) + slopes[i] * x + offsets[i])
        )
        mean, spread = step(mean), spread * (step(torch.ones_like(mean)) - step(torch.zeros_like(mean)))
    made = sample_euler(tuned, noise, LEVELS)[-1]
    torch.testing.assert_close(made, mean + spread * noise, rtol=1e-9, atol=1e-12)
    assert ((mean - GOAL).abs() < 0.9 * (sample_euler(gaussian_velocity, noise * 0, LEVELS)[-1][0] - GOAL).abs()).all()
    assert (spread > 0.1).all(), "it keeps its diversity"


class Kept:
    """A tensor that autograd keeps for a backward pass; counts the bytes of all."""

    bytes = peak = 0

    def __init__(self, tensor):
        self.tensor, Kept.bytes = tensor, Kept.bytes + tensor.nbytes
        Kept.peak = max(Kept.peak, Kept.bytes)

    def __del__(self):
        Kept.bytes -= self.tensor.nbytes


def test_memory_is_that_of_one_step_whatever_their_number_is(make_pipe, make_args):
    peaks = []
    for method, steps in (("adjoint_matching", 3), ("adjoint_matching", 6), ("draft_k", 6)):
        settings = {"num_grad_steps": steps} if method == "draft_k" else {}
        args = make_args(method=method, num_inference_steps=steps, max_steps=1, **settings)
        trainer = RewardGradientTrainer(make_pipe(), redness, args, PROMPTS)
        Kept.bytes = Kept.peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            trainer.step(0)
        peaks.append(Kept.peak)
    assert peaks[0] == peaks[1] < 0.5 * peaks[2]
