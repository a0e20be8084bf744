"""Every method's gradient: in closed form on a toy, by a written-out adjoint on the tiny model."""

import math
from collections import Counter

import pytest
import torch
from problem import GUIDANCE, SIGMAS, Problem

from rlhf.config import METHODS, RewardGradientConfig
from rlhf.device import generator
from rlhf.method.drift import drift_step_weights
from rlhf.method.leap_align import Leaps
from rlhf.method.options import SCORES_ALONE, read_options
from rlhf.method.plan import Plan, gradient_samples, make_plan, recover
from rlhf.method.rollout import rollout
from rlhf.method.velocity import velocity_field

GRADIENT_METHODS = tuple(method for method in METHODS if method not in (*SCORES_ALONE, "adjoint_matching"))
TEN_STEPS = torch.linspace(1, 0, 11, dtype=torch.float64)
SETTINGS = {
    "draft_k": {"num_grad_steps": 3},
    "draft_lv": {"method_kwargs": {"num_draws": 2}},
    "alignprop": {"num_grad_steps": 3},
    "uniform": {"num_grad_steps": 2},
    "listed": {"method_kwargs": {"steps": [0, 2]}},
    "drtune": {"num_grad_steps": 2, "method_kwargs": {"jump_steps": 2}},
    "refl": {"method_kwargs": {"jump_steps": 2}},
    "srpo": {"method_kwargs": {"num_draws": 4, "align_sigmas": [0.4, 0.6], "align_delta": 0.1}},
    "leap_align": {"method_kwargs": {"leap_tolerance": 0.01}},
    "prfl": {},
}


def plan_of(method: str, sigmas=SIGMAS, draw: int = 0, **settings) -> Plan:
    args = RewardGradientConfig(method=method, **(SETTINGS[method] | settings))
    return make_plan(args, read_options(method, args.method_kwargs), sigmas, generator("test", draw))


def samples_of(velocity, noise, plan: Plan):
    """The samples of a rollout by one velocity, in both phases."""
    states = rollout(velocity, velocity, noise("train"), plan.sigmas, plan.grad_steps, plan.detach_input)
    return gradient_samples(velocity, states, noise, plan)


def test_every_method_is_tested_here():
    assert set(SETTINGS) == set(GRADIENT_METHODS)


# ---------------------------------------- the plans, and what they promise


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_plan_comes_from_its_draw_alone(method):
    plans = [plan_of(method, TEN_STEPS, draw) for draw in (3, 3, *range(40))]
    described = [(p.grad_steps, p.sigmas.tolist(), p.recoveries, p.leaps, p.drift_step) for p in plans]
    assert described[0] == described[1]
    random = method in ("alignprop", "uniform", "drtune", "refl", "srpo", "leap_align", "prfl")
    assert any(d != described[0] for d in described) == random
    for plan in plans:
        assert plan.sigmas[0] == 1
        assert plan.sigmas[-1] == 0 or method == "prfl"
        assert (plan.sigmas.diff() < 0).all()


def test_the_truncation_of_alignprop_is_even_over_all_lengths():
    lengths = torch.tensor([len(plan_of("alignprop", draw=draw).grad_steps) for draw in range(600)])
    counts = torch.bincount(lengths, minlength=4)[1:]
    assert counts.sum() == 600
    assert counts.min() > 160


def test_refl_jumps_from_any_of_the_last_steps_and_no_other():
    plans = [plan_of("refl", TEN_STEPS, draw, method_kwargs={"jump_steps": 3}) for draw in range(100)]
    assert {len(p.sigmas) - 2 for p in plans} == {7, 8, 9}
    assert all(p.grad_steps == [len(p.sigmas) - 2] for p in plans)


@pytest.mark.parametrize(
    ("method", "steps", "last"), [("refl", 40, set(range(30, 40))), ("refl", 3, {2}), ("drtune", 40, {39})]
)
def test_without_jump_steps_refl_jumps_from_the_last_quarter_and_drtune_not(method, steps, last):
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    plans = [plan_of(method, sigmas, draw, method_kwargs=None) for draw in range(200)]
    assert {len(plan.sigmas) - 2 for plan in plans} == last


def test_drtune_trains_its_steps_before_the_jump():
    for draw in range(100):
        plan = plan_of("drtune", TEN_STEPS, draw, num_grad_steps=3, method_kwargs={"jump_steps": 4})
        assert len(plan.grad_steps) == 3
        assert plan.grad_steps[-1] <= len(plan.sigmas) - 2
        assert 7 <= len(plan.sigmas) - 1 <= 10
        assert plan.detach_input


def test_srpo_recovers_each_level_from_both_sides():
    plan = plan_of("srpo", TEN_STEPS)
    (a, b, c, d), levels = plan.recoveries, [s for i in range(9) for s, _ in plan_of("srpo", draw=i).recoveries]
    assert (a[1], b[1], c[1], d[1]) == (-0.1, 0.1, -0.1, 0.1)
    assert a[0] == b[0] != c[0] == d[0]
    assert all(0.4 <= level <= 0.6 for level in levels)
    assert [
        s
        for _, s in plan_of(
            "srpo", TEN_STEPS, method_kwargs={"num_draws": 1, "align_delta": 0.1, "align_sigmas": [0.4, 0.6]}
        ).recoveries
    ] == [-0.1], "no inversion: a reward alone"
    assert plan.num_samples == 4


def test_the_last_step_is_the_one_that_draft_lv_takes_again():
    plan = plan_of("draft_lv", TEN_STEPS)
    assert (plan.grad_steps, plan.num_samples) == ([9], 3)


def test_a_shortened_prefix_moves_the_window_alone():
    plan = plan_of("draft_k", TEN_STEPS, prefix_steps=2, drift_weight=0.1)
    assert plan.grad_steps == [2, 3, 4]
    assert torch.equal(plan.sigmas[2:], TEN_STEPS[7:])
    assert plan.drift_total == pytest.approx(drift_step_weights(plan.sigmas).sum().item())
    for whole in (plan_of("draft_k", TEN_STEPS, prefix_steps=20), plan_of("srpo", TEN_STEPS, prefix_steps=2)):
        assert torch.equal(whole.sigmas, TEN_STEPS)


# ---------------------------------------- the toy, in closed form

THETA, X, AGAIN = 0.7, 1.3, {"draw 0": 0.4, "draw 1": -1.1}
TOY_SIGMAS = [1.0, 0.9, 0.7, 0.4, 0.0]


def toy_rate(sigma: float) -> float:
    return 1 + sigma


def toy_gradient(plan: Plan) -> float:
    """d/dtheta of the plan's reward, of the denoiser v = theta (1 + sigma) x.

    The reward is the sum of what rewards of pixels see, x0, and twice of what those of latents see,
    over 3: of finished videos the sum of x0.
    """
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    noise = {"train": X} | AGAIN
    samples = samples_of(
        lambda x, sigma: theta * toy_rate(sigma) * x,
        lambda purpose: torch.tensor([[[[[noise[purpose]]]]]], dtype=torch.float64),
        plan,
    )
    for sample in samples:
        assert sample.sigma == plan.sigmas[-1]
        total = (sample.latents.sum() + 2 * sample.scored_latents.sum()) / 3
        ((-1 if sample.penalty else 1) * total / plan.num_samples).backward()
    return theta.grad.item()


def toy_states(sigmas: list[float]) -> list[float]:
    states = [X]
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        states.append(states[-1] * (1 + (after - sigma) * THETA * toy_rate(sigma)))
    return states


def toy_closed_form(plan: Plan) -> float:
    """The sum over grad_steps of (sigma' - sigma) dv/dtheta, times the gain of later ones."""
    sigmas = plan.sigmas.tolist()
    states, steps = toy_states(sigmas), [after - sigma for sigma, after in zip(sigmas, sigmas[1:], strict=False)]
    gains = {i: 1 + steps[i] * THETA * toy_rate(sigmas[i]) for i in plan.grad_steps}
    total = 0.0
    for i in plan.grad_steps:
        later = math.prod(gains[j] for j in plan.grad_steps if j > i and not plan.detach_input)
        total += steps[i] * toy_rate(sigmas[i]) * states[i] * later
    last = sigmas[-2]
    if sigmas[-1] > 0:  # the step's end, and the estimate of x0: a longer step
        total = (2 * total - last * toy_rate(last) * states[-2]) / 3
    for noise in list(AGAIN.values())[: plan.repeat_last_step]:
        total -= last * toy_rate(last) * ((1 - last) * states[-1] + last * noise)
    for sigma, step in plan.recoveries:
        start = sigma - step
        state = (1 - start) * states[-1] + start * X
        total += (-1 if step > 0 else 1) * step * toy_rate(start) * state / (1 - sigma)
    if leaps := plan.leaps:
        (x_k, s_k), (x_j, s_j) = ((states[i], sigmas[i]) for i in (leaps.start, leaps.middle))
        far_j = abs(x_k - (s_k - s_j) * THETA * toy_rate(s_k) * x_k - x_j)
        far_0 = abs(x_j - s_j * THETA * toy_rate(s_j) * x_j - states[-1])
        moved_j = -(s_k - s_j) * toy_rate(s_k) * x_k
        moved_0 = moved_j - s_j * toy_rate(s_j) * (x_j + leaps.discount * THETA * moved_j)
        total += 0.02 / (max(far_j, 0.01) + max(far_0, 0.01)) * moved_0
    return total / plan.num_samples


@pytest.mark.parametrize("draw", range(4))
@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_the_toys_gradient_is_the_closed_form(method, draw):
    plan = plan_of(method, torch.tensor(TOY_SIGMAS, dtype=torch.float64), draw)
    assert toy_gradient(plan) == pytest.approx(toy_closed_form(plan), rel=1e-12)


def test_methods_agree_where_they_are_the_same_and_differ_elsewhere():
    sigmas = torch.tensor(TOY_SIGMAS, dtype=torch.float64)
    last = toy_gradient(plan_of("draft_k", sigmas, num_grad_steps=1))
    assert toy_gradient(plan_of("listed", sigmas, method_kwargs={"steps": [3]})) == last
    assert toy_gradient(plan_of("refl", sigmas, method_kwargs={"jump_steps": 1})) == last
    full = toy_gradient(plan_of("draft_k", sigmas, num_grad_steps=4))
    assert toy_gradient(plan_of("listed", sigmas, method_kwargs={"steps": [0, 1, 2, 3]})) == full
    assert abs(toy_gradient(plan_of("drtune", sigmas, num_grad_steps=4, method_kwargs=None)) - full) > 0.1 * abs(full)


def test_a_known_noise_recovers_the_video_exactly_and_another_velocity_moves_it_as_told():
    shape, sigma = (1, 16, 2, 4, 4), torch.tensor(0.8, dtype=torch.float64)
    x0, noise, wrong = torch.randn(3, *shape, generator=generator("recover"), dtype=torch.float64)
    for step in (-0.1, 0.1):
        assert torch.allclose(recover(lambda x, s: noise - x0, x0, noise, sigma, step), x0, atol=1e-12)
        moved = recover(lambda x, s: noise - x0 + wrong, x0, noise, sigma, step)
        torch.testing.assert_close(moved - x0, step / (1 - sigma) * wrong)


# ---------------------------------------- the tiny model, by an adjoint written out


class Adjoint:
    """Vector-Jacobian products of the guided velocity, one step and one branch at a time."""

    def __init__(self, problem: Problem):
        self.p = problem

    def branches(self):
        text, pooled, negative, negative_pooled = vars(self.p.cond).values()
        return (GUIDANCE, text, pooled), (1 - GUIDANCE, negative, negative_pooled)

    def velocity(self, x, sigma, weight, text, pooled):
        return weight * self.p.transformer(x, text, pooled, (sigma * 1000).expand(len(x))).sample

    @torch.no_grad()
    def states(self, sigmas) -> list[torch.Tensor]:
        states = [self.p.noise]
        for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
            states.append(self.euler(states[-1], sigma, after))
        return states

    def pull(self, x, sigma, cotangent) -> torch.Tensor:
        """Adds cotangent dv/dtheta to the parameters' gradients; cotangent dv/dx."""
        total = torch.zeros_like(x)
        for branch in self.branches():
            x = x.detach().requires_grad_()
            self.velocity(x, sigma, *branch).backward(cotangent)
            total += x.grad
        return total

    def of_loss(self, latents) -> torch.Tensor:
        latents = latents.detach().requires_grad_()
        return torch.autograd.grad(self.p.loss(latents), latents)[0]

    def of_latents(self, latents, sigma) -> torch.Tensor:
        latents = latents.detach().requires_grad_()
        return torch.autograd.grad(loss_of_latents(latents, sigma), latents)[0]

    def gradient(self, plan: Plan) -> torch.Tensor:
        """What the plan documents, from products alone: no graph is longer than one velocity."""
        sigmas, states = plan.sigmas, self.states(plan.sigmas)
        if plan.grad_steps:
            adjoint = self.of_loss(states[-1])
            if sigmas[-1] > 0:
                x, s, s_next = states[-2], sigmas[-2], sigmas[-1]
                estimate = self.of_loss(self.euler(x, s, torch.zeros_like(s)))
                adjoint = self.of_latents(states[-1], s_next) + s / (s - s_next) * estimate
            for i in reversed(range(plan.grad_steps[0], len(sigmas) - 1)):
                if i in plan.grad_steps:
                    pulled = self.pull(states[i], sigmas[i], (sigmas[i + 1] - sigmas[i]) * adjoint)
                    adjoint = adjoint if plan.detach_input else adjoint + pulled
        for draw in range(plan.repeat_last_step):
            x = (1 - sigmas[-2]) * states[-1] + sigmas[-2] * noise_of(self.p, f"draw {draw}")
            self.recovered(x, sigmas[-2], torch.zeros_like(sigmas[-2]), lambda x: x, 1.0)
        for level, step in plan.recoveries:
            sigma, start = sigmas.new_tensor(level), sigmas.new_tensor(level - step)
            x = (1 - start) * states[-1] + start * self.p.noise
            back = lambda x, sigma=sigma: (x - sigma * self.p.noise) / (1 - sigma)
            self.recovered(x, start, sigma, back, (-1 if step > 0 else 1) / (1 - sigma))
        if leaps := plan.leaps:
            x_k, x_j, (s_k, s_j) = states[leaps.start], states[leaps.middle], sigmas[[leaps.start, leaps.middle]]
            far = (self.euler(x_k, s_k, s_j) - x_j), (self.euler(x_j, s_j, sigmas[-1]) - states[-1])
            weight = 2 / sum((d.abs().flatten(1).mean(1) / leaps.tolerance).clamp(min=1) for d in far)
            adjoint = weight.view(-1, 1, 1, 1, 1) * self.of_loss(states[-1])
            adjoint = adjoint + leaps.discount * self.pull(x_j, s_j, -s_j * adjoint)
            self.pull(x_k, s_k, (s_j - s_k) * adjoint)
        return self.p.collect() / plan.num_samples

    @torch.no_grad()
    def euler(self, x, sigma, sigma_next) -> torch.Tensor:
        return x + (sigma_next - sigma) * sum(self.velocity(x, sigma, *branch) for branch in self.branches())

    def recovered(self, x, sigma, sigma_next, back, scale) -> None:
        """One Euler step from x, made a video by `back` of derivative `scale` up to the sign."""
        adjoint = self.of_loss(back(self.euler(x, sigma, sigma_next)))
        self.pull(x, sigma, (sigma_next - sigma) * scale * adjoint)


def noise_of(problem: Problem, purpose: str) -> torch.Tensor:
    if purpose == "train":
        return problem.noise
    return torch.randn(problem.noise.shape, generator=generator(purpose), dtype=torch.float64)


def loss_of_latents(latents, sigma) -> torch.Tensor:
    return (1 + sigma) * (latents**3).mean() * 10


def method_gradient(problem: Problem, plan: Plan) -> torch.Tensor:
    velocity = velocity_field(problem.transformer, problem.cond, GUIDANCE)
    for sample in samples_of(velocity, lambda purpose: noise_of(problem, purpose), plan):
        sign = -1 if sample.penalty else 1
        loss = sign * problem.loss(sample.latents) / plan.num_samples
        if sample.state is not None:
            loss = loss + loss_of_latents(sample.state, sample.sigma)
        loss.backward()
    return problem.collect()


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_the_models_gradient_is_the_documented_one(problem, method):
    plan = plan_of(method, draw=1)
    gradient = method_gradient(problem, plan)
    assert gradient.norm() > 0
    expected = Adjoint(problem).gradient(plan)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9 * expected.abs().max().item())


def test_draft_with_all_steps_is_the_exact_gradient_and_the_estimators_are_not(problem):
    """Plain autograd through the whole sampler, without a plan."""
    velocity = velocity_field(problem.transformer, problem.cond, GUIDANCE)
    problem.loss(rollout(velocity, velocity, problem.noise, SIGMAS, [0, 1, 2])[-1]).backward()
    exact = problem.collect()
    for method, draw in [*((method, 1) for method in GRADIENT_METHODS), ("alignprop", 2)]:
        plan = plan_of(method, draw=draw)
        off = ((method_gradient(problem, plan) - exact).norm() / exact.norm()).item()
        if plan.grad_steps == [0, 1, 2] and not plan.detach_input:
            assert method in ("draft_k", "alignprop")
            assert off < 1e-12
        else:
            assert off > 1e-2, (method, off)


def test_the_last_step_is_drawn_again_at_its_own_noise_level(problem):
    """DRaFT-LV's extra states have the mean and spread of the last step's, around the video."""
    seen = []
    velocity = lambda x, sigma: seen.append((x.detach(), sigma)) or torch.zeros_like(x)
    sigmas = torch.tensor([1.0, 0.6, 0.3, 0.0], dtype=torch.float64)
    plan = plan_of("draft_lv", sigmas, method_kwargs={"num_draws": 400})
    for _ in samples_of(velocity, lambda purpose: noise_of(problem, purpose), plan):
        pass
    again = torch.stack([x for x, sigma in seen[3:]])
    assert len(again) == 400
    assert {sigma.item() for _, sigma in seen[2:]} == {0.3}
    torch.testing.assert_close(again.mean(0), 0.7 * problem.noise, atol=0.08, rtol=0)
    assert again.std(0).mean().item() == pytest.approx(0.3, rel=0.01)


# ---------------------------------------- steps to a state that is not finished


def test_prfl_draws_each_of_its_steps_alike_and_ends_after_it():
    for drawn, first in ((None, 0), (3, 7)):
        plans = [plan_of("prfl", TEN_STEPS, draw, method_kwargs={"drawn_steps": drawn}) for draw in range(600)]
        counts = Counter(plan.grad_steps[0] for plan in plans)
        assert set(counts) == set(range(first, 10))
        assert min(counts.values()) > 0.6 * 600 / (10 - first)
        assert all(torch.equal(plan.sigmas, TEN_STEPS[: plan.grad_steps[0] + 2]) for plan in plans)


def test_the_last_step_of_prfl_is_that_of_draft_k(problem):
    last = next(p for p in (plan_of("prfl", draw=draw) for draw in range(40)) if p.grad_steps == [2])
    assert torch.equal(method_gradient(problem, last), method_gradient(problem, plan_of("draft_k", num_grad_steps=1)))


# ---------------------------------------- leaps


def leap_gradient(problem: Problem, start: int, middle: int, discount: float) -> torch.Tensor:
    plan = Plan(SIGMAS, [], leaps=Leaps(start, middle, discount, tolerance=100.0))  # with full weight
    return method_gradient(problem, plan)


def test_leaps_of_one_step_are_the_last_steps_themselves(problem):
    """The whole gradient of DRaFT-K with discount 1, and DRTune's with 0."""
    for discount, detach in ((1.0, False), (0.0, True)):
        same = method_gradient(problem, Plan(SIGMAS, [1, 2], detach_input=detach))
        torch.testing.assert_close(leap_gradient(problem, 1, 2, discount), same, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("discount", [1.0, 0.3, 0.0])
@pytest.mark.parametrize(("start", "middle"), [(0, 1), (0, 2), (1, 2)])
def test_the_gradient_is_that_of_autograd_through_two_leaps_at_the_rollouts_values(problem, start, middle, discount):
    p, velocity = problem, velocity_field(problem.transformer, problem.cond, GUIDANCE)
    gradient = leap_gradient(p, start, middle, discount)
    states = rollout(velocity, velocity, p.noise, SIGMAS, [])
    at = lambda value, x, share=1.0: value + share * (x - x.detach())  # the value with the gradient of x
    x_k, x_j = states[start], states[middle]
    leap_j = x_k + (SIGMAS[middle] - SIGMAS[start]) * velocity(x_k, SIGMAS[start])
    leap_0 = at(x_j, leap_j) - SIGMAS[middle] * velocity(at(x_j, leap_j, discount), SIGMAS[middle])
    p.loss(at(states[-1], leap_0)).backward()
    torch.testing.assert_close(gradient, p.collect(), rtol=1e-9, atol=1e-12)


def test_leaps_start_at_any_two_steps_alike():
    drawn = [plan_of("leap_align", TEN_STEPS, draw).leaps for draw in range(900)]
    counts = Counter((leaps.start, leaps.middle) for leaps in drawn)
    assert set(counts) == {(k, j) for j in range(10) for k in range(j)}
    assert min(counts.values()) >= 5
