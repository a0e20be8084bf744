"""The gradient at the adapter against finite differences and independent back-propagation."""

import pytest
import torch
from problem import GUIDANCE, SIGMAS, STEPS

from rlhf.generator.wan_decoder import decode_video, unnormalise
from rlhf.method.grad_steps import choose_grad_steps


@pytest.mark.parametrize(("num_grad", "checkpointed"), [(1, False), (2, False), (3, False), (2, True)])
def test_gradient_equals_central_finite_differences(problem, num_grad, checkpointed):
    gradient = problem.gradient(num_grad, problem.checkpointed if checkpointed else None)
    generator = torch.Generator().manual_seed(num_grad)
    assert all(
        piece.abs().max() > 0 for name, piece in problem.masters.named(gradient).items() if carries_gradient(name)
    )
    for _ in range(3):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        step = 2e-5
        difference = problem.loss_at(step * direction, num_grad) - problem.loss_at(-step * direction, num_grad)
        assert difference / (2 * step) == pytest.approx((gradient @ direction).item(), rel=1e-6)


def carries_gradient(name: str) -> bool:
    """All but the last block's text query, whose result nothing reads."""
    return not (name.startswith("transformer_blocks.1.") and "add_q_proj" in name)


def test_all_steps_in_the_window_equal_full_back_propagation_written_out(problem):
    """An independent straight line: own guidance, own Euler, stock decode."""
    p = problem
    gradient = p.gradient(STEPS)
    x = p.noise
    for i in range(STEPS):
        time = (SIGMAS[i] * 1000).expand(2)
        text, pooled, negative, negative_pooled = (t for t in vars(p.cond).values())
        v_text = p.transformer(x, text, pooled, time).sample
        v_neg = p.transformer(x, negative, negative_pooled, time).sample
        x = x + (SIGMAS[i + 1] - SIGMAS[i]) * (GUIDANCE * v_text + (1 - GUIDANCE) * v_neg)
    decoded = p.vae.decode(unnormalise(p.vae, x)).sample
    assert decoded.abs().max() < 1, "here the stock clamp would stop the gradient"
    p.loss_of_video((decoded + 1) / 2).backward()
    torch.testing.assert_close(gradient, p.collect(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_grad", [1, 2])
def test_steps_before_the_window_contribute_nothing(problem, num_grad):
    """It is the gradient of a rollout from the window on; no earlier forward has a graph."""
    p = problem
    with_grad = []
    hook = p.transformer.register_forward_pre_hook(lambda *_: with_grad.append(torch.is_grad_enabled()))
    gradient = p.gradient(num_grad)
    hook.remove()
    assert with_grad == [False] * (2 * (STEPS - num_grad)) + [True] * (2 * num_grad)

    window = SIGMAS[STEPS - num_grad :]
    start = p.latents(p.noise, SIGMAS[: STEPS - num_grad + 1], []).detach()
    p.loss(p.latents(start, window, list(range(num_grad)))).backward()
    assert torch.equal(gradient, p.collect())
    assert not torch.allclose(gradient, p.gradient(num_grad + 1)), "one more step has to matter"


@pytest.mark.parametrize("num_grad", [1, 3])
def test_checkpointing_changes_no_gradient(problem, num_grad):
    plain = problem.gradient(num_grad)
    problem.recompute_blocks()
    checkpointed = problem.gradient(num_grad, chunk=1, checkpoint=True)
    torch.testing.assert_close(checkpointed, plain, rtol=1e-9, atol=1e-12)


def test_fewer_decoded_frames_give_the_gradient_of_those_frames(problem):
    """A reward that sees one frame gets the same gradient whether one frame or all are decoded."""
    p, steps = problem, choose_grad_steps("last", STEPS, 1)

    def gradient(**decode):
        video = decode_video(p.vae, p.latents(p.noise, SIGMAS, steps), **decode)
        (video[:, :, :1] * p.weight[:, :, :1]).sum().backward()
        return p.collect()

    torch.testing.assert_close(gradient(num_frames=1), gradient(), rtol=1e-9, atol=1e-12)
