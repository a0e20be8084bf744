"""Latents to the frames that are scored, as the settings say."""

import torch
from diffusers import AutoencoderKLWan

from rlhf.config import RewardGradientConfig
from rlhf.contentv.wan_decoder import decode_video
from rlhf.device import generator
from rlhf.host_memory import HostMemory


class Decoder:
    """Latents (B, C, T, H, W) and optimizer step -> video (B, 3, frames, 8H, 8W) in [0, 1], with gradient.

    frames: how many leading frames any reward asked for. With `decode_window`, as many of them as it says, from a
    frame that is drawn for each step; the rest is decoded without gradient.
    """

    def __init__(self, vae: AutoencoderKLWan, frames: int, args: RewardGradientConfig, device: torch.device):
        self.vae, self.frames, self.args = vae, frames, args
        self.caches = HostMemory(device) if args.decode_caches == "host" else None

    def __call__(self, latents_BCTHW: torch.Tensor, step: int) -> torch.Tensor:
        args, (first, last) = self.args, self.window(step)
        return decode_video(
            self.vae, latents_BCTHW, last, args.decode_chunk, args.decode_checkpoint, first, self.caches
        )

    def window(self, step: int) -> tuple[int, int]:
        """The frames first .. last-1 that are scored in a step."""
        size = min(self.args.decode_window or self.frames, self.frames)
        room = self.frames - size + 1
        first = int(torch.randint(room, (), generator=generator("window", self.args.seed, step))) if room > 1 else 0
        return first, first + size
