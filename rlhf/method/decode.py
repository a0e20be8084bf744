"""From latents to pixels: scored frames with gradient, whole sample videos without."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan

from rewards.contract import NoisyLatents
from rlhf.device import generator
from rlhf.execution.offload import HostMemory
from rlhf.generator.wan_decoder import decode_video
from rlhf.method.rollout import Velocity, sample_euler
from rlhf.types import Conditioning


class Decoder:
    """Latents (B, C, T, H, W) and a step -> video (B, 3, frames, 8H, 8W) in [0, 1], with gradient.

    Args:
        frames: the leading frames that any reward asks for; 0 if nothing is to be decoded.
        window: frames that are decoded with gradient, from a frame drawn for each step; the frames
            before them are decoded without. None: all frames.
        seed: of the draws.
        chunk, checkpoint, caches: as in `decode_video`.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        frames: int,
        window: int | None = None,
        seed: int = 0,
        chunk: int | None = None,
        checkpoint: bool = False,
        caches: HostMemory | None = None,
    ):
        self.vae, self.frames, self.seed = vae, frames, seed
        self.window_size = min(window or frames, frames)
        self.chunk, self.checkpoint, self.caches = chunk, checkpoint, caches

    def __call__(self, latents_BCTHW: torch.Tensor, step: int) -> torch.Tensor | None:
        """Return the frames that are scored in this step, None for none."""
        if self.frames == 0:
            return None
        first, last = self.window(step)
        return decode_video(self.vae, latents_BCTHW, last, self.chunk, self.checkpoint, first, self.caches)

    def window(self, step: int) -> tuple[int, int]:
        """Draw the step's window of scored frames; return (first, end), end exclusive."""
        room = self.frames - self.window_size + 1
        first = int(torch.randint(room, (), generator=generator("window", self.seed, step))) if room > 1 else 0
        return first, first + self.window_size


class Sampled(NamedTuple):
    """Videos (B, 3, T, H, W) in [0, 1], and the latents from which they were decoded."""

    video_BCTHW: torch.Tensor
    latents: NoisyLatents | None = None  # None where no reward can ask for them


@dataclass(frozen=True)
class VideoSampler:
    """Prompts and noise (B, C, T, H, W) -> videos and their latents, without gradient."""

    field: Callable[[Conditioning], Velocity]
    embed: Callable[[list[str], torch.device], Conditioning]
    vae: AutoencoderKLWan
    sigmas: torch.Tensor
    decode_chunk: int | None = None

    @torch.no_grad()
    def __call__(self, prompts: list[str], noise_BCTHW: torch.Tensor) -> Sampled:
        """Return the videos with their latents."""
        device = self.sigmas.device
        cond = self.embed(prompts, device)
        latents = sample_euler(self.field(cond), noise_BCTHW.to(device), self.sigmas)[-1]
        told = NoisyLatents(latents, 0.0, cond.prompt_embeds_BLD, cond.pooled_embeds_BP)
        return Sampled(decode_video(self.vae, latents, chunk=self.decode_chunk), told)
