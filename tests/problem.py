"""A small problem in float64 on which gradients are proved as numbers."""

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample
from diffusers.models.normalization import RMSNorm
from tiny import tiny_conditioning, tiny_transformer, tiny_vae

from rlhf.config import RewardGradientConfig
from rlhf.contentv.wan_decoder import decode_video
from rlhf.fields import velocity_field
from rlhf.grad_steps import choose_grad_steps
from rlhf.lora import Masters, add_adapter, lora_config
from rlhf.sampler import rollout

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
        velocity = velocity_field(self.transformer, self.cond, GUIDANCE)
        return rollout(velocity, velocity, noise, sigmas, grad_steps)[-1]

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


def keep_float64(monkeypatch) -> None:
    """diffusers rounds to float32 in two places, which would blur finite differences."""
    monkeypatch.setattr(WanUpsample, "forward", torch.nn.Upsample.forward)
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.eps))
