"""From latents to pixels: scored frames with gradient, whole sample videos without."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan

from rlhf.device import generator
from rlhf.execution.offload import HostMemory
from rlhf.generator.wan_decoder import decode_video
from rlhf.method.rollout import Velocity, sample_euler
from rlhf.types import Conditioning


class Decoder:
    """Latents (B, C, T, H, W) and a step -> video (B, 3, frames, 8H, 8W) in [0, 1], with gradient.

    Args:
        frames: the leading frames that any reward asks for.
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

    def __call__(self, latents_BCTHW: torch.Tensor, step: int) -> torch.Tensor:
        """Return the frames that are scored in this step."""
        first, last = self.window(step)
        return decode_video(self.vae, latents_BCTHW, last, self.chunk, self.checkpoint, first, self.caches)

    def window(self, step: int) -> tuple[int, int]:
        """Return (first, end) of the frames that are scored in this step; end is exclusive."""
        room = self.frames - self.window_size + 1
        first = int(torch.randint(room, (), generator=generator("window", self.seed, step))) if room > 1 else 0
        return first, first + self.window_size


@dataclass(frozen=True)
class VideoSampler:
    """Prompts and noise (B, C, T, H, W) -> videos (B, 3, T, H, W) in [0, 1], without gradient."""

    field: Callable[[Conditioning], Velocity]
    embed: Callable[[list[str], torch.device], Conditioning]
    vae: AutoencoderKLWan
    sigmas: torch.Tensor
    decode_chunk: int | None = None

    @torch.no_grad()
    def __call__(self, prompts: list[str], noise_BCTHW: torch.Tensor) -> torch.Tensor:
        """Return the videos."""
        device = self.sigmas.device
        latents = sample_euler(self.field(self.embed(prompts, device)), noise_BCTHW.to(device), self.sigmas)[-1]
        return decode_video(self.vae, latents, chunk=self.decode_chunk)
