"""The backward pass branch by branch: the gradient of plain autograd, the memory of one branch."""

import pytest
import torch
from kept import KeptBytes
from problem import SIGMAS, Problem

from rlhf.method.adjoint import CheckpointedTransformer


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("num_grad", [1, 2, 3])
def test_the_gradient_is_that_of_plain_autograd(problem, num_grad, together):
    expected = problem.gradient(num_grad)
    found = problem.gradient(num_grad, problem.checkpointed, together)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_grad", [1, 3])
def test_in_float32_they_differ_by_a_millionth_at_most(num_grad):
    problem = Problem(torch.float32)
    expected = problem.gradient(num_grad)
    found = problem.gradient(num_grad, problem.checkpointed)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_branches_run_again_one_by_one_after_the_decoder_last_step_first():
    problem, log = Problem(), []
    problem.transformer.register_forward_pre_hook(
        lambda module, args: log.append((round(args[3][0].item()), torch.is_grad_enabled()))
    )
    latents = problem.latents(problem.noise, SIGMAS, [1, 2], problem.checkpointed)
    assert log == [(time, False) for time in (1000, 1000, 700, 700, 400, 400)]
    log.clear()
    latents.register_hook(lambda grad: log.append("gradient of the latents"))
    problem.loss(latents).backward()
    assert log == ["gradient of the latents", (400, True), (400, True), (700, True), (700, True)]


def memory(problem, transformer, num_grad):
    with KeptBytes(problem.transformer, problem.vae) as kept:
        latents = problem.latents(problem.noise, problem.sigmas, [0, 1, 2][3 - num_grad :], transformer)
        rollout = kept.now
        problem.loss(latents).backward()
    return rollout, kept.most


def test_memory_is_that_of_one_branch_however_many_steps():
    problem = Problem(torch.float32, num_layers=8)
    with KeptBytes(problem.transformer, problem.vae) as kept:
        latents = problem.latents(problem.noise, problem.sigmas, [2])
        branch = kept.now / 2
        del latents
        loss = problem.loss(torch.zeros_like(problem.noise).requires_grad_())
        decoder = kept.now
        del loss
    plain = {num_grad: memory(problem, problem.transformer, num_grad) for num_grad in (1, 3)}
    stepwise = {num_grad: memory(problem, problem.checkpointed, num_grad) for num_grad in (1, 3)}
    state = problem.noise.numel() * 4
    assert plain[3][0] > 5 * branch
    assert stepwise[3][0] == 3 * state + 3 * 4, "one state a step, and what it is multiplied by"
    assert stepwise[1][0] == state + 4
    assert stepwise[3][1] <= max(branch, decoder) + 6 * state, (stepwise, branch, decoder, state)
    assert stepwise[3][1] - stepwise[1][1] <= 2 * state + 8
    assert plain[3][1] > 2 * stepwise[3][1]


def test_a_call_without_gradient_keeps_nothing():
    problem = Problem(torch.float64)
    with KeptBytes(problem.transformer) as kept, torch.no_grad():
        problem.latents(problem.noise, problem.sigmas, [], problem.checkpointed)
    assert kept.most == 0
    assert problem.checkpointed.dtype == torch.float64


def test_the_transformer_gets_all_that_was_given():
    given, scale = [], {"scale": 0.5}
    stepwise = CheckpointedTransformer(lambda x, *conditions, **more: given.append((conditions, more)) or (x,), [])
    stepwise(torch.zeros(1), 1, 2, 3, joint_attention_kwargs=scale, return_dict=True)
    assert given == [((1, 2, 3), {"joint_attention_kwargs": scale, "return_dict": False})]
