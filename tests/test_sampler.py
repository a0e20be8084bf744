"""The rollout samples what the pipeline samples, and its noise belongs to the sample alone."""

import pytest
import torch
from problem import GUIDANCE, SIGMAS, STEPS

from rlhf.contentv.flow import flow_sigmas
from rlhf.sampler import draw_noise, rollout, velocity_field
from rlhf.text import encode_prompts


def test_rollout_equals_the_pipeline(tiny_pipe):
    noise, prompts = draw_noise((16, 2, 4, 4), 0, "test", [(0,), (1,)]), ["a cat", "rain"]
    cond = encode_prompts(tiny_pipe, prompts, "ugly", 24)(prompts, "cpu")
    velocity = velocity_field(tiny_pipe.transformer, cond, 2.5)
    latents = rollout(velocity, noise, flow_sigmas(tiny_pipe.scheduler, 3), [])
    expected = tiny_pipe(
        prompts,
        negative_prompt=["ugly", "ugly"],
        latents=noise,
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=3,
        guidance_scale=2.5,
        max_sequence_length=24,
        output_type="latent",
    ).frames
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


def test_the_window_changes_no_latent_and_ends_in_a_graph(tiny_pipe):
    noise = draw_noise((16, 2, 4, 4), 0, "test", [(0,)])
    cond = encode_prompts(tiny_pipe, ["rain"], "", 24)(["rain"], "cpu")
    tiny_pipe.transformer.proj_out.requires_grad_(True)
    sigmas = flow_sigmas(tiny_pipe.scheduler, 4)
    velocity = velocity_field(tiny_pipe.transformer, cond, 3.0)
    plain = rollout(velocity, noise, sigmas, [])
    windowed = rollout(velocity, noise, sigmas, [2, 3])
    assert torch.equal(plain, windowed)
    assert windowed.requires_grad
    assert not plain.requires_grad
    assert windowed.dtype == torch.float32
    kept = rollout(velocity, noise, sigmas, [], reuse=lambda prefix: prefix() + 1)
    assert torch.equal(kept, plain + 1), "without a window, all of it is used again"


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


# --------------------------------------------------------------------------------- guidance under the gradient


def branch_gradient(problem, text_weight: float, negative_weight: float) -> torch.Tensor:
    """Of one last step from the same guided state: the text's and the negative branch's gradient, weighted."""
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
    latents = rollout(velocity, p.noise, SIGMAS, [STEPS - 1])
    torch.testing.assert_close(latents, p.latents(p.noise, SIGMAS, []), rtol=1e-12, atol=1e-12)
    p.loss(latents).backward()
    gradient, expected = p.collect(), branch_gradient(p, *weights)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9 * expected.abs().max().item())


def test_only_full_is_exact_and_none_is_textual_by_a_factor_for_one_step(problem):
    def gradient(mode):
        velocity = velocity_field(problem.transformer, problem.cond, GUIDANCE, mode)
        problem.loss(rollout(velocity, problem.noise, SIGMAS, [STEPS - 1])).backward()
        return problem.collect()

    full, text, none = (gradient(mode) for mode in ("full", "text", "none"))
    torch.testing.assert_close(text, GUIDANCE * none)
    assert torch.cosine_similarity(full, text, dim=0) < 0.999


def test_a_distilled_velocity_is_the_text_branch_alone(problem):
    p = problem
    velocity = velocity_field(p.transformer, p.cond, GUIDANCE, "distill")
    text, pooled, *_ = vars(p.cond).values()
    expected = p.transformer(p.noise, text, pooled, (SIGMAS[0] * 1000).expand(2)).sample
    assert torch.equal(velocity(p.noise, SIGMAS[0]), expected)
    unguided = velocity_field(p.transformer, p.cond, 0.5, "text")  # at 1 or less there is no guidance
    assert torch.equal(unguided(p.noise, SIGMAS[0]), expected)


def test_a_detached_input_leaves_the_direct_path(problem):
    """What is left is the sum over steps of one step's own gradient at the state that the rollout met."""
    p, velocity = problem, velocity_field(problem.transformer, problem.cond, GUIDANCE)
    p.loss(rollout(velocity, p.noise, SIGMAS, [0, 2], detach_input=True)).backward()
    gradient = p.collect()
    states = [p.noise] + [rollout(velocity, p.noise, SIGMAS[: i + 1], []) for i in range(1, STEPS + 1)]
    end = states[-1].clone().requires_grad_()
    adjoint = torch.autograd.grad(p.loss(end), end)[0]
    for i in (0, 2):
        velocity(states[i], SIGMAS[i]).backward((SIGMAS[i + 1] - SIGMAS[i]) * adjoint)
    torch.testing.assert_close(gradient, p.collect(), rtol=1e-9, atol=1e-12)
