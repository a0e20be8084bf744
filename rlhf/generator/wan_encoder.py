"""Latents of real videos by Wan2.1's VAE, on the scale that the transformer sees."""

import torch
from diffusers import AutoencoderKLWan

from rlhf.generator.wan_decoder import latent_scale


@torch.no_grad()
def encode_video(vae: AutoencoderKLWan, video_BCTHW: torch.Tensor) -> torch.Tensor:
    """Return normalised latents (B, C, T, H, W), float32: the mean of the VAE's posterior.

    `rlhf.generator.wan_decoder.decode_video` of them is the video up to the VAE's own error.

    Args:
        vae: with an encoder; computes in its own dtype.
        video_BCTHW: 4k + 1 frames in [0, 1].
    """
    mean_BCTHW = vae.encode((2 * video_BCTHW - 1).to(vae.dtype)).latent_dist.mean
    mean_BCTHW = mean_BCTHW.to(torch.promote_types(mean_BCTHW.dtype, torch.float32))
    mean, std = latent_scale(vae, mean_BCTHW)
    return (mean_BCTHW - mean) / std
