"""The backward pass one step and one branch at a time: the gradient of plain autograd, in the memory of one branch."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample
from diffusers.models.normalization import RMSNorm
from kept import KeptBytes
from peft import LoraConfig
from tiny import tiny_conditioning, tiny_transformer, tiny_vae

from rlhf.adjoint import CheckpointedTransformer
from rlhf.contentv.flow import euler_step, guided_velocity
from rlhf.contentv.wan_decoder import decode_video

SIGMAS = torch.tensor([1.0, 0.7, 0.4, 0.0], dtype=torch.float64)
GUIDANCE = 3.0


class Problem:
    """A tiny model whose adapter has B != 0, and a smooth reward of its video."""

    def __init__(self, dtype=torch.float64, num_layers=2):
        self.transformer, self.vae = tiny_transformer(num_layers=num_layers).to(dtype), tiny_vae().to(dtype)
        self.vae.decoder.conv_out.weight.mul_(0.3)  # no pixel saturates
        targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out"]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
            self.transformer.add_adapter(config)
        self.parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(5)
        self.cond = tiny_conditioning(batch=2).to(dtype)
        self.noise = torch.randn(2, 16, 2, 4, 4, generator=generator).to(dtype)
        self.weight = torch.randn(2, 3, 5, 32, 32, generator=generator).to(dtype)
        self.dtype = dtype

    def latents(self, transformer, num_grad: int, start=None, **guidance):
        x, sigmas = self.noise if start is None else start, SIGMAS.to(self.dtype)
        for i in range(0 if start is None else 3 - num_grad, 3):
            with torch.set_grad_enabled(i >= 3 - num_grad):
                v = guided_velocity(transformer, x, sigmas[i], self.cond, GUIDANCE, **guidance)
            x = euler_step(x, v, sigmas[i], sigmas[i + 1])
        return x

    def loss(self, latents):
        video = decode_video(self.vae, latents)
        return (video * self.weight).mean() * 100 + (video**2).mean()

    def gradient(self, transformer, num_grad, **guidance):
        for p in self.parameters:
            p.grad = None
        self.loss(self.latents(transformer, num_grad, **guidance)).backward()
        return torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])

    @property
    def checkpointed(self):
        return CheckpointedTransformer(self.transformer, self.parameters)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("num_grad", [1, 2, 3])
def test_the_gradient_is_that_of_plain_autograd(num_grad, together):
    problem = Problem()
    expected = problem.gradient(problem.transformer, num_grad)
    found = problem.gradient(problem.checkpointed, num_grad, together=together)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_grad", [1, 3])
def test_in_float32_they_differ_by_a_millionth_at_most(num_grad):
    problem = Problem(torch.float32)
    expected = problem.gradient(problem.transformer, num_grad)
    found = problem.gradient(problem.checkpointed, num_grad)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_the_gradient_equals_central_finite_differences(monkeypatch):
    """In float64 throughout: diffusers rounds to float32 in two places, which would blur finite differences."""
    monkeypatch.setattr(WanUpsample, "forward", torch.nn.Upsample.forward)
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.eps))
    problem, generator = Problem(), torch.Generator().manual_seed(6)
    gradient = problem.gradient(problem.checkpointed, 2)
    with torch.no_grad():
        v = guided_velocity(problem.transformer, problem.noise, SIGMAS[0], problem.cond, GUIDANCE)
        start = euler_step(problem.noise, v, SIGMAS[0], SIGMAS[1])
        trained = [p for p in problem.parameters if p.grad is not None]
        directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trained]

        def loss_at(step):
            for p, direction in zip(trained, directions, strict=True):
                p.add_(direction, alpha=step)
            loss = problem.loss(problem.latents(problem.transformer, 2, start)).item()
            for p, direction in zip(trained, directions, strict=True):
                p.add_(direction, alpha=-step)
            return loss

        slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    assert slope == pytest.approx((gradient @ torch.cat([d.flatten() for d in directions])).item(), rel=1e-6)


def test_branches_run_again_one_by_one_after_the_decoder_last_step_first():
    problem, log = Problem(), []
    problem.transformer.register_forward_pre_hook(
        lambda module, args: log.append((round(args[3][0].item()), torch.is_grad_enabled()))
    )
    latents = problem.latents(problem.checkpointed, 2)
    assert [time for time, _ in log] == [1000, 1000, 700, 700, 400, 400]
    assert not any(with_graph for _, with_graph in log)
    log.clear()
    latents.register_hook(lambda grad: log.append("gradient of the latents"))
    problem.loss(latents).backward()
    assert log == ["gradient of the latents", (400, True), (400, True), (700, True), (700, True)]


def memory(problem, transformer, num_grad):
    with KeptBytes(problem.transformer, problem.vae) as kept:
        latents = problem.latents(transformer, num_grad)
        rollout = kept.now
        problem.loss(latents).backward()
    return rollout, kept.most


def test_memory_is_that_of_one_branch_however_many_steps():
    problem = Problem(torch.float32, num_layers=8)
    with KeptBytes(problem.transformer, problem.vae) as kept:
        latents = problem.latents(problem.transformer, 1)
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
    problem = Problem()
    with KeptBytes(problem.transformer) as kept, torch.no_grad():
        problem.latents(problem.checkpointed, 0)
    assert kept.most == 0
    assert problem.checkpointed.dtype == torch.float64


def test_the_transformer_gets_all_that_was_given():
    given, scale = [], {"scale": 0.5}
    stepwise = CheckpointedTransformer(lambda x, *conditions, **more: given.append((conditions, more)) or (x,), [])
    stepwise(torch.zeros(1), 1, 2, 3, joint_attention_kwargs=scale, return_dict=True)
    assert given == [((1, 2, 3), {"joint_attention_kwargs": scale, "return_dict": False})]
