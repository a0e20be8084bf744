"""A small problem on which gradients are proved as numbers, in float64 unless asked otherwise."""

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample
from diffusers.models.normalization import RMSNorm
from tiny import tiny_conditioning, tiny_transformer, tiny_vae
from tiny_wan import tiny_wan_conditioning, tiny_wan_transformer

from rlhf.adapter.lora import add_adapter, lora_config
from rlhf.adapter.masters import MasterWeights
from rlhf.config import RewardGradientConfig
from rlhf.execution.blocks import BlockRunner
from rlhf.generator.wan_decoder import decode_video
from rlhf.method.adjoint import CheckpointedTransformer
from rlhf.method.grad_steps import choose_grad_steps
from rlhf.method.rollout import rollout
from rlhf.method.velocity import velocity_field

STEPS, GUIDANCE = 3, 3.0
SIGMAS = torch.tensor([1.0, 0.7, 0.4, 0.0], dtype=torch.float64)


class Problem:
    """A tiny model whose adapter has B != 0, and a smooth reward of the decoded video."""

    def __init__(self, dtype=torch.float64, num_layers=2, wan=False, modules=None):
        make, conditioning = (
            (tiny_wan_transformer, tiny_wan_conditioning) if wan else (tiny_transformer, tiny_conditioning)
        )
        self.transformer, self.vae = make(num_layers=num_layers).to(dtype), tiny_vae().to(dtype)
        self.vae.decoder.conv_out.weight.mul_(0.3)  # no saturated pixel: its gradient goes straight through
        add_adapter(
            self.transformer, lora_config(RewardGradientConfig(lora_rank=2, lora_target_modules=modules)), seed=0
        )
        self.masters = MasterWeights(self.transformer)
        generator = torch.Generator().manual_seed(5)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        with torch.no_grad():  # B starts as zero, where the gradient of A is zero and proves nothing
            self.masters.vector += 0.1 * normal(*self.masters.vector.shape)
        self.masters.write()
        self.cond = conditioning(batch=2, dtype=dtype)
        self.sigmas = SIGMAS.to(dtype)
        self.noise, self.weight = normal(2, 16, 2, 4, 4), normal(2, 3, 5, 32, 32)

    def recompute_blocks(self, recompute="block", **options) -> None:
        parts = self.transformer.block_parts
        self.transformer.run_block = BlockRunner(recompute=recompute, parts=parts, **options)

    @property
    def checkpointed(self) -> CheckpointedTransformer:
        return CheckpointedTransformer(self.transformer, self.masters.params)

    def latents(self, noise, sigmas, grad_steps, transformer=None, together=False):
        velocity = velocity_field(transformer or self.transformer, self.cond, GUIDANCE, together=together)
        return rollout(velocity, velocity, noise, sigmas, grad_steps)[-1]

    def loss(self, latents, **decode):
        return self.loss_of_video(decode_video(self.vae, latents, **decode))

    def loss_of_video(self, video):
        return -((video * self.weight).mean() * 100 + (video**2).mean())

    def gradient(self, num_grad: int, transformer=None, together=False, **decode) -> torch.Tensor:
        """Back-propagate through the last num_grad steps, as the trainer does."""
        steps = choose_grad_steps("last", STEPS, num_grad)
        self.loss(self.latents(self.noise, self.sigmas, steps, transformer, together), **decode).backward()
        return self.collect()

    def collect(self) -> torch.Tensor:
        self.masters.collect_grad()
        gradient = self.masters.vector.grad.clone()
        self.masters.vector.grad.zero_()
        return gradient

    @torch.no_grad()
    def loss_at(self, shift: torch.Tensor, num_grad: int) -> float:
        """The loss if only the last num_grad steps ran with the adapter moved by `shift`."""
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
