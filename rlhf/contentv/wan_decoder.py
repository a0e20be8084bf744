"""Differentiable decoding of Wan2.1 latents with functional causal caches.

`AutoencoderKLWan.decode` walks through the latents one by one and keeps the last frames seen by every causal
convolution in a list that it mutates, so no part of it can be recomputed in a backward pass. Here these caches are
tensors that go in and come out of a pure function over the very same modules: a chunk of latents of any length gives
the same frames, and can be checkpointed. Tiling and slicing settings of the VAE are not looked at.

Shape legend: B batch, C channels, T latent frames or frames, H W height and width.
"""

from itertools import repeat

import torch
import torch.utils.checkpoint
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import CACHE_T


def decode_video(
    vae: AutoencoderKLWan,
    latents_BCTHW: torch.Tensor,
    num_frames: int | None = None,
    chunk: int | None = None,
    checkpoint: bool = False,
) -> torch.Tensor:
    """Video (B, 3, frames, 8H, 8W) in [0, 1], float32, of normalised latents (B, C, T, H, W).

    Args:
        latents_BCTHW: what the transformer sees; un-normalised here by the VAE's `latents_mean` and `latents_std`.
        num_frames: leading frames wanted, None for all 4(T-1)+1. Only the latents that these depend on are decoded.
        chunk: latents decoded at a time, None for all at once. Any value gives the same video.
        checkpoint: recompute each chunk in the backward pass instead of keeping its activations.

    The clamp to [0, 1] passes gradients straight through: a saturated pixel still pulls.
    """
    _check_vae(vae)
    frames_per_latent = 2 ** sum(vae.config.temperal_downsample)
    num_frames = _check_num_frames(num_frames, latents_BCTHW.shape[2], frames_per_latent)
    num_latents = 1 + -(-(num_frames - 1) // frames_per_latent)
    latents = unnormalise(vae, latents_BCTHW[:, :, :num_latents]).to(vae.dtype)
    video = _decode_chunks(vae, latents, chunk or num_latents, checkpoint)[:, :, :num_frames]
    video = video.to(torch.promote_types(video.dtype, torch.float32))
    return (_ClampStraightThrough.apply(video) + 1) / 2


def unnormalise(vae: AutoencoderKLWan, latents_BCTHW: torch.Tensor) -> torch.Tensor:
    """Latents of unit variance to the VAE's own scale: x * std + mean per channel."""
    mean, std = (
        torch.tensor(values, dtype=latents_BCTHW.dtype, device=latents_BCTHW.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return latents_BCTHW * std + mean


def _decode_chunks(vae, latents, chunk: int, checkpoint: bool) -> torch.Tensor:
    x = vae.post_quant_conv(latents)
    frames, caches = [], ()
    for start in range(0, x.shape[2], chunk):
        arguments = (vae.decoder, x[:, :, start : start + chunk], *caches)
        if checkpoint and torch.is_grad_enabled():
            y, caches = torch.utils.checkpoint.checkpoint(
                _decode_chunk, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y, caches = _decode_chunk(*arguments)
        frames.append(y)
    return torch.cat(frames, 2) if len(frames) > 1 else frames[0]


def _decode_chunk(decoder, x, *caches):
    """Consecutive latents and the caches left by those before (none: the video starts here) -> frames, new caches."""
    conv = _CausalConvs(caches)
    x = conv(decoder.conv_in, x)
    x = _residual_block(decoder.mid_block.resnets[0], x, conv)
    for attention, resnet in zip(decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True):
        x = _residual_block(resnet, attention(x), conv)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _residual_block(resnet, x, conv)
        if block.upsamplers is not None:
            x = _upsample(block.upsamplers[0], x, conv)
    x = conv(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x)))
    return x, tuple(conv.new_caches)


class _CausalConvs:
    """Applies causal convolutions in decoder order, taking each one's cache and collecting the next."""

    def __init__(self, caches: tuple):
        self.is_start = not caches
        self.old_caches = iter(caches) if caches else repeat(None)
        self.new_caches: list[torch.Tensor | None] = []

    def __call__(self, conv, x):
        cache = next(self.old_caches)
        if x.shape[2] == 0:  # the first latent alone has nothing for a temporal upsampler
            self.new_caches.append(cache)
            return x.new_empty(x.shape[0], conv.out_channels, *x.shape[2:])
        seen = x if cache is None else torch.cat([cache, x[:, :, -CACHE_T:]], 2)
        self.new_caches.append(seen[:, :, -CACHE_T:])
        return conv(x, cache)


def _residual_block(block, x, conv):
    h = conv(block.conv1, block.nonlinearity(block.norm1(x)))
    h = conv(block.conv2, block.dropout(block.nonlinearity(block.norm2(h))))
    return h + block.conv_shortcut(x)


def _upsample(resample, x, conv):
    if resample.mode == "upsample3d":
        x = _double_frames(resample.time_conv, x, conv)
    B, _, T = x.shape[:3]
    return resample.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (B, T)).transpose(1, 2)


def _double_frames(time_conv, x, conv):
    """Every frame but the video's first becomes two; the convolution sees zeros in place of that first frame."""
    first, rest = (x[:, :, :1], x[:, :, 1:]) if conv.is_start else (x[:, :, :0], x)
    pairs = conv(time_conv, rest).unflatten(1, (2, -1))
    doubled = torch.stack((pairs[:, 0], pairs[:, 1]), 3).flatten(2, 3)
    return torch.cat([first, doubled], 2)


class _ClampStraightThrough(torch.autograd.Function):
    """Clamp to [-1, 1] whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx, grad):
        return grad


def _check_vae(vae) -> None:
    if vae.config.is_residual or vae.config.patch_size is not None:
        raise ValueError(
            f"VAE config has is_residual={vae.config.is_residual}, patch_size={vae.config.patch_size}, expected the "
            "Wan2.1 decoder (False, None); use the VAE that ContentV was trained with"
        )


def _check_num_frames(num_frames: int | None, num_latents: int, frames_per_latent: int) -> int:
    available = frames_per_latent * (num_latents - 1) + 1
    if num_frames is None:
        return available
    if not 1 <= num_frames <= available:
        raise ValueError(
            f"num_frames={num_frames}, expected 1 to {available} for {num_latents} latent frames; ask for fewer frames "
            "or sample a longer video"
        )
    return num_frames
