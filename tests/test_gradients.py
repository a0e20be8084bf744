"""The loss gradient at the adapter, proved as a number: against finite differences and independent back-propagation."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample
from diffusers.models.normalization import RMSNorm
from tiny import tiny_conditioning, tiny_transformer, tiny_vae

from rlhf.config import RewardGradientConfig
from rlhf.contentv.wan_decoder import decode_video, unnormalise
from rlhf.grad_steps import choose_grad_steps
from rlhf.lora import Masters, add_adapter, lora_config
from rlhf.sampler import rollout, velocity_field

STEPS, GUIDANCE = 3, 3.0
SIGMAS = torch.tensor([1.0, 0.7, 0.4, 0.0], dtype=torch.float64)


class Problem:
    """A tiny model in float64 whose adapter has B != 0, and a smooth reward of the decoded video."""

    def __init__(self):
        self.transformer, self.vae = tiny_transformer().double(), tiny_vae().double()
        self.vae.decoder.conv_out.weight.mul_(
            0.3
        )  # no pixel saturates: there the gradient goes straight through instead
        add_adapter(self.transformer, lora_config(RewardGradientConfig(lora_rank=2)), seed=0)
        self.masters = Masters(self.transformer)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():  # B starts as zero, where the gradient of A is zero and proves nothing
            self.masters.vector += 0.1 * torch.randn(
                self.masters.vector.shape, generator=generator, dtype=torch.float64
            )
        self.masters.write()
        self.cond = tiny_conditioning(batch=2, dtype=torch.float64)
        self.noise = torch.randn(2, 16, 2, 4, 4, generator=generator, dtype=torch.float64)
        self.weight = torch.randn(2, 3, 5, 32, 32, generator=generator, dtype=torch.float64)

    def latents(self, noise, sigmas, grad_steps):
        return rollout(velocity_field(self.transformer, self.cond, GUIDANCE), noise, sigmas, grad_steps)

    def loss(self, latents, **decode):
        return self.loss_of_video(decode_video(self.vae, latents, **decode))

    def loss_of_video(self, video):
        return -((video * self.weight).mean() * 100 + (video**2).mean())

    def gradient(self, num_grad: int, **decode) -> torch.Tensor:
        """What the trainer computes: the last num_grad steps of the rollout, decoded, scored, back."""
        self.loss(self.latents(self.noise, SIGMAS, choose_grad_steps("last", STEPS, num_grad)), **decode).backward()
        return self.collect()

    def collect(self) -> torch.Tensor:
        self.masters.collect_grad()
        gradient = self.masters.vector.grad.clone()
        self.masters.vector.grad.zero_()
        return gradient

    @torch.no_grad()
    def loss_at(self, shift: torch.Tensor, num_grad: int) -> float:
        """The loss if only the window of the last num_grad steps ran with the adapter moved by `shift`."""
        prefix = self.latents(self.noise, SIGMAS[: STEPS - num_grad + 1], [])
        self.masters.vector += shift
        self.masters.write()
        loss = self.loss(self.latents(prefix, SIGMAS[STEPS - num_grad :], []))
        self.masters.vector -= shift
        self.masters.write()
        return loss.item()


@pytest.fixture
def problem(monkeypatch):
    """In float64 throughout: diffusers rounds to float32 in two places, which would blur finite differences."""
    monkeypatch.setattr(WanUpsample, "forward", torch.nn.Upsample.forward)
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.eps))
    return Problem()


@pytest.mark.parametrize("num_grad", [1, 2, 3])
def test_gradient_equals_central_finite_differences(problem, num_grad):
    gradient, generator = problem.gradient(num_grad), torch.Generator().manual_seed(num_grad)
    assert all(
        piece.abs().max() > 0 for name, piece in problem.masters.named(gradient).items() if carries_gradient(name)
    )
    for _ in range(3):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        step = 1e-4
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
    """The gradient is that of a rollout which starts at the window, and no earlier forward has a graph."""
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
    problem.transformer.enable_gradient_checkpointing()
    checkpointed = problem.gradient(num_grad, chunk=1, checkpoint=True)
    torch.testing.assert_close(checkpointed, plain, rtol=1e-9, atol=1e-12)


def test_both_guidance_branches_carry_gradient(problem):
    """For one step the gradient is the sum of what each branch alone would give, and neither is zero."""
    p = problem
    full = p.gradient(1)
    x = p.latents(p.noise, SIGMAS[:STEPS], []).detach()
    time, step = (SIGMAS[-2] * 1000).expand(2), SIGMAS[-1] - SIGMAS[-2]
    text, pooled, negative, negative_pooled = (t for t in vars(p.cond).values())

    def branch(keep: str) -> torch.Tensor:
        v_text = p.transformer(x, text, pooled, time).sample
        v_neg = p.transformer(x, negative, negative_pooled, time).sample
        v_text, v_neg = (v_text, v_neg.detach()) if keep == "text" else (v_text.detach(), v_neg)
        p.loss(x + step * (v_neg + GUIDANCE * (v_text - v_neg))).backward()
        return p.collect()

    of_text, of_negative = branch("text"), branch("negative")
    assert of_text.norm() > 0.1 * full.norm()
    assert of_negative.norm() > 0.1 * full.norm()
    torch.testing.assert_close(of_text + of_negative, full, rtol=1e-9, atol=1e-12)


def test_fewer_decoded_frames_give_the_gradient_of_those_frames(problem):
    """A reward that sees one frame gets the same gradient whether one frame or all are decoded."""
    p, steps = problem, choose_grad_steps("last", STEPS, 1)

    def gradient(**decode):
        video = decode_video(p.vae, p.latents(p.noise, SIGMAS, steps), **decode)
        (video[:, :, :1] * p.weight[:, :, :1]).sum().backward()
        return p.collect()

    torch.testing.assert_close(gradient(num_frames=1), gradient(), rtol=1e-9, atol=1e-12)
