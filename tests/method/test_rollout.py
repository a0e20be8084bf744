"""Rollouts: states, guidance under the gradient, cheaper prefixes, noise of a sample."""

from dataclasses import replace

import pytest
import torch
from problem import GUIDANCE, SIGMAS, STEPS
from tiny import SAMPLING

from rlhf.generator.flow import flow_sigmas
from rlhf.generator.text import encode_prompts
from rlhf.method.plan import Plan, shorten_prefix
from rlhf.method.rollout import RolloutCache, draw_noise, rollout, sample_euler
from rlhf.method.velocity import velocity_field


def test_rollout_equals_the_pipeline(make_pipe):
    pipe = make_pipe()
    noise, prompts = draw_noise((16, 2, 4, 4), 0, "test", [(0,), (1,)]), ["a cat", "rain"]
    cond = encode_prompts(pipe, prompts, "ugly", 24)(prompts, "cpu")
    velocity = velocity_field(pipe.transformer, cond, 2.5)
    latents = sample_euler(velocity, noise, flow_sigmas(pipe.scheduler, 3))[-1]
    sizes = replace(SAMPLING, width=32, num_frames=5, num_inference_steps=3, guidance_scale=2.5)
    how = sizes.call_arguments() | {"negative_prompt": ["ugly", "ugly"], "output_type": "latent"}
    expected = pipe(prompts, latents=noise, **how).frames
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


def test_the_window_changes_no_latent_and_ends_in_a_graph(make_pipe):
    pipe = make_pipe()
    noise = draw_noise((16, 2, 4, 4), 0, "test", [(0,)])
    cond = encode_prompts(pipe, ["rain"], "", 24)(["rain"], "cpu")
    pipe.transformer.proj_out.requires_grad_(True)
    sigmas = flow_sigmas(pipe.scheduler, 4)
    velocity = velocity_field(pipe.transformer, cond, 3.0)
    plain = sample_euler(velocity, noise, sigmas)
    windowed = rollout(velocity, velocity, noise, sigmas, [2, 3])
    assert all(torch.equal(a, b) for a, b in zip(plain, windowed, strict=True))
    assert [x.requires_grad for x in windowed] == [False] * 3 + [True] * 2
    assert not plain[-1].requires_grad
    assert windowed[-1].dtype == torch.float32


def test_each_phase_has_its_velocity_and_a_start_is_taken_as_it_is():
    called = []

    def velocity(name):
        return lambda x, sigma: called.append((name, torch.is_grad_enabled())) or 0 * x

    noise = torch.ones(1, 1, 1, 1, 1)
    sigmas = torch.linspace(1, 0, 5)
    assert len(rollout(velocity("prefix"), velocity("window"), noise, sigmas, [1, 3])) == 5
    steps = [("prefix", False), ("window", True), ("prefix", False), ("window", True)]
    assert called == steps
    called.clear()
    states = rollout(velocity("prefix"), velocity("window"), noise, sigmas, [1, 3], start=noise + 1)
    assert states[0] is None
    assert states[1:] == [noise + 1] * 4
    assert called == steps[1:]
    assert rollout(None, None, noise, sigmas, [], start=noise + 1)[4] == 2, "without a window, all of it is reused"


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    shape = (16, 2, 4, 4)
    both = draw_noise(shape, 7, "train", [(3, 0), (3, 1)])
    assert torch.equal(both[1:], draw_noise(shape, 7, "train", [(3, 1)]))
    others = [(7, "train", (4, 1)), (8, "train", (3, 1)), (7, "evaluation", (3, 1))]
    for seed, purpose, key in others:
        assert not torch.allclose(both[1:], draw_noise(shape, seed, purpose, [key]))
    many = draw_noise(shape, 7, "train", [(0, i) for i in range(64)])
    assert abs(many.mean().item()) < 0.02
    assert abs(many.std().item() - 1) < 0.02


# ---------------------------------------- guidance under the gradient


def branch_gradient(problem, text_weight: float, negative_weight: float) -> torch.Tensor:
    """The text and the negative branch's gradient of one last step, weighted."""
    p = problem
    x = p.latents(p.noise, SIGMAS[:STEPS], []).detach()
    time, step = (SIGMAS[-2] * 1000).expand(2), SIGMAS[-1] - SIGMAS[-2]
    text, pooled, negative, negative_pooled = vars(p.cond).values()
    v_text = p.transformer(x, text, pooled, time).sample
    v_neg = p.transformer(x, negative, negative_pooled, time).sample
    value = (x + step * (GUIDANCE * v_text + (1 - GUIDANCE) * v_neg)).detach().requires_grad_()
    adjoint = torch.autograd.grad(p.loss(value), value)[0]
    (text_weight * v_text + negative_weight * v_neg).backward(step * adjoint)
    return p.collect()


@pytest.mark.parametrize(
    ("mode", "weights"),
    [("full", (GUIDANCE, 1 - GUIDANCE)), ("text", (GUIDANCE, 0.0)), ("none", (1.0, 0.0))],
)
def test_guidance_carries_the_gradient_that_the_mode_names_and_keeps_its_value(problem, mode, weights):
    p = problem
    velocity = velocity_field(p.transformer, p.cond, GUIDANCE, mode)
    full = velocity_field(p.transformer, p.cond, GUIDANCE)
    latents = rollout(full, velocity, p.noise, SIGMAS, [STEPS - 1])[-1]
    torch.testing.assert_close(latents, p.latents(p.noise, SIGMAS, []), rtol=1e-12, atol=1e-12)
    p.loss(latents).backward()
    gradient, expected = p.collect(), branch_gradient(p, *weights)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9 * expected.abs().max().item())


def test_only_full_is_exact_and_none_is_textual_by_a_factor_for_one_step(problem):
    def gradient(mode):
        prefix, window = (velocity_field(problem.transformer, problem.cond, GUIDANCE, m) for m in ("full", mode))
        problem.loss(rollout(prefix, window, problem.noise, SIGMAS, [STEPS - 1])[-1]).backward()
        return problem.collect()

    full, text, none = (gradient(mode) for mode in ("full", "text", "none"))
    torch.testing.assert_close(text, GUIDANCE * none)
    assert torch.cosine_similarity(full, text, dim=0) < 0.999
    for branch in (text, full - text):  # neither is zero
        assert branch.norm() > 0.1 * full.norm()


def test_a_distilled_velocity_is_the_text_branch_alone(problem):
    p = problem
    velocity = velocity_field(p.transformer, p.cond, GUIDANCE, "distill")
    text, pooled, *_ = vars(p.cond).values()
    expected = p.transformer(p.noise, text, pooled, (SIGMAS[0] * 1000).expand(2)).sample
    assert torch.equal(velocity(p.noise, SIGMAS[0]), expected)
    unguided = velocity_field(p.transformer, p.cond, 0.5, "text")  # at 1 or less there is no guidance
    assert torch.equal(unguided(p.noise, SIGMAS[0]), expected)


def test_a_detached_input_leaves_the_direct_path(problem):
    """The gradient is the sum over steps of one step's gradient at the rollout's state."""
    p, velocity = problem, velocity_field(problem.transformer, problem.cond, GUIDANCE)
    p.loss(rollout(velocity, velocity, p.noise, SIGMAS, [0, 2], detach_input=True)[-1]).backward()
    gradient = p.collect()
    states = sample_euler(velocity, p.noise, SIGMAS)
    end = states[-1].clone().requires_grad_()
    adjoint = torch.autograd.grad(p.loss(end), end)[0]
    for i in (0, 2):
        velocity(states[i], SIGMAS[i]).backward((SIGMAS[i + 1] - SIGMAS[i]) * adjoint)
    torch.testing.assert_close(gradient, p.collect(), rtol=1e-9, atol=1e-12)


# ---------------------------------------- cheaper prefixes

SIX_STEPS = torch.tensor([1.0, 0.9, 0.75, 0.6, 0.4, 0.2, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("window", "steps", "expected"),
    [(4, 2, [0, 1, 4, 5, 6]), (5, 5, range(7)), (3, 1, [0, 3, 4, 5, 6]), (5, 4, [0, 1, 2, 3, 5, 6])],
)
def test_fewer_steps_keep_the_window_and_more_of_the_first_steps(window, steps, expected):
    plan = shorten_prefix(Plan(SIX_STEPS, [window, 5]), steps)
    assert torch.equal(plan.sigmas, SIX_STEPS[list(expected)])
    assert plan.grad_steps == [steps, 5 - window + steps]


def test_a_shortened_prefix_has_as_many_steps_as_asked_and_no_level_twice():
    sigmas = torch.linspace(1, 0, 26)
    for steps in range(1, 25):
        shortened = shorten_prefix(Plan(sigmas, [24]), steps).sigmas
        assert len(shortened) == steps + 2
        assert (shortened.diff() < 0).all()
        assert torch.equal(shortened[[0, -2, -1]], sigmas[[0, 24, 25]])


def test_a_rollout_is_sampled_once_and_reused_as_often_as_asked():
    cache, made = RolloutCache(3), []
    for step in range(7):
        for micro in range(2):
            number = cache.rollout_index(step, micro)
            if (start := cache.get(step, micro)) is None:
                made.append((number, micro, step))
                start = torch.tensor(made[-1])
            cache.put(step, micro, start)
            assert start[0] == number
            assert step - start[2] <= 2, "staleness is bounded"
    assert made == [(0, 0, 0), (0, 1, 0), (1, 1, 2), (1, 0, 3), (2, 1, 5), (2, 0, 6)]
    assert len(cache.starts) == 2, "one for each batch of a step"
    assert [cache.rollout_index(0, micro) for micro in range(5)] == [0] * 5, "none is left out"


def test_a_rollout_for_one_step_is_not_kept():
    cache = RolloutCache(1)
    assert [cache.rollout_index(step, 0) for step in range(3)] == [0, 1, 2]
    cache.put(0, 0, torch.zeros(1))
    assert cache.get(0, 0) is None
    assert cache.starts == {}
