"""Differentiable decoding of Wan2.1 latents with functional causal caches.

`AutoencoderKLWan.decode` decodes latents one by one and keeps the last frames that each causal
convolution saw in a list that it mutates. No part of it can therefore be recomputed in a backward
pass. Here these caches are inputs and outputs of a pure function over the same modules. A chunk of
any number of latents gives the same frames, and can be run again. Tiling and slicing settings of
the VAE have no effect.

Shape legend: B batch, C channels, T latent frames or frames, H W height and width.
"""

from functools import partial
from itertools import repeat

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import CACHE_T

from rlhf.execution.offload import HostMemory
from rlhf.execution.recompute import gradient_checkpoint
from rlhf.generator.frozen_layers import conv, norm_silu
from rlhf.types import clamp_straight_through


def decode_video(
    vae: AutoencoderKLWan,
    latents_BCTHW: torch.Tensor,
    num_frames: int | None = None,
    chunk: int | None = None,
    checkpoint: bool = False,
    first_frame: int = 0,
    caches: HostMemory | None = None,
) -> torch.Tensor:
    """Return the video (B, 3, frames, 8H, 8W), float32 in [0, 1], of latents (B, C, T, H, W).

    The clamp to [0, 1] passes gradients straight through: a saturated pixel still has a gradient.
    See `saturated_share`.

    Args:
        latents_BCTHW: normalised, as the transformer sees them; the VAE's `latents_mean` and
            `latents_std` are applied here.
        num_frames: leading frames wanted; None for all 4(T-1)+1. Later latents are not decoded.
        chunk: latents decoded at a time; None for all at once. Every value gives the same video.
        checkpoint: recompute each chunk in the backward pass instead of keeping its activations.
        first_frame: leave out the frames before it. Their latents are decoded without gradient, so
            their effect on later frames through the caches is not in the gradient: not exact above
            0.
        caches: with checkpoint, holds the caches between chunks until the backward pass; None keeps
            them on the device.

    Raises:
        ValueError: another VAE than Wan2.1's, or frames that the latents do not have.
    """
    _check_vae(vae)
    per_latent = 2 ** sum(vae.config.temperal_downsample)
    available = per_latent * (latents_BCTHW.shape[2] - 1) + 1
    num_frames = available if num_frames is None else num_frames
    _check_frames(first_frame, num_frames, available)
    first, last = (-(-frame // per_latent) for frame in (first_frame, num_frames - 1))  # their latents
    latents = unnormalise(vae, latents_BCTHW[:, :, : last + 1]).to(vae.dtype)
    video = decode_unclamped(vae, latents, first, chunk, checkpoint, caches)
    start = per_latent * (first - 1) + 1 if first else 0  # the first frame of the first latent
    video = video[:, :, first_frame - start : num_frames - start]
    video = video.to(torch.promote_types(video.dtype, torch.float32))
    return (clamp_straight_through(video, -1, 1) + 1) / 2


def unnormalise(vae: AutoencoderKLWan, latents_BCTHW: torch.Tensor) -> torch.Tensor:
    """Return normalised latents on the VAE's scale: x * std + mean of each channel."""
    mean, std = latent_scale(vae, latents_BCTHW)
    return latents_BCTHW * std + mean


def latent_scale(vae: AutoencoderKLWan, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation of each channel, (1, C, 1, 1, 1) in the dtype of `like`."""
    values = vae.config.latents_mean, vae.config.latents_std
    return tuple(torch.tensor(v, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1) for v in values)


def saturated_share(video_BCTHW: torch.Tensor) -> torch.Tensor:
    """Return the share (B,) of a decoded video's values that were clamped."""
    with torch.no_grad():
        return ((video_BCTHW <= 0) | (video_BCTHW >= 1)).float().mean((1, 2, 3, 4))


def use_channels_last(vae: AutoencoderKLWan) -> None:
    """Order the decoder's weights with channels innermost, in place; faster on a CPU."""
    for module in vae.decoder.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)


def decode_unclamped(
    vae: AutoencoderKLWan,
    latents_BCTHW: torch.Tensor,
    first: int = 0,
    chunk: int | None = None,
    checkpoint: bool = False,
    caches: HostMemory | None = None,
) -> torch.Tensor:
    """Return frames in about [-1, 1] of latents on the VAE's scale, from latent number `first` on.

    The other arguments are those of `decode_video`.
    """
    x = _point_conv(vae.post_quant_conv, latents_BCTHW)
    chunk, last_caches = chunk or x.shape[2], ()
    with torch.no_grad():
        for piece in x[:, :, :first].split(chunk, 2) if first else ():  # an empty tensor splits into one
            _, *last_caches = _decode_chunk(vae.decoder, piece, *last_caches)
    frames, pieces = [], x[:, :, first:].split(chunk, 2)
    trained = [p for p in vae.decoder.parameters() if p.requires_grad]
    for i, piece in enumerate(pieces):
        decode = partial(_decode_chunk, vae.decoder, is_last=i == len(pieces) - 1)
        if checkpoint:
            place = caches.group() if caches else None
            decode = partial(gradient_checkpoint, decode, parameters=trained, offload=place)
        y, *last_caches = decode(piece, *last_caches)
        frames.append(y)
    return frames[0] if len(frames) == 1 else torch.cat(frames, 2)


def _decode_chunk(decoder, x, *old_caches, is_last: bool = False):
    """Return the frames of consecutive latents, and the caches for the next ones."""
    causal = _CausalConvs(old_caches, is_last)
    x = causal(decoder.conv_in, x)
    x = _residual_block(decoder.mid_block.resnets[0], x, causal)
    for attention, resnet in zip(decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True):
        x = _residual_block(resnet, attention(x), causal)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _residual_block(resnet, x, causal)
        if block.upsamplers is not None:
            x = _upsample(block.upsamplers[0], x, causal)
    x = causal(decoder.conv_out, norm_silu(decoder.norm_out, x))
    return x, *causal.new_caches


class _CausalConvs:
    """Causal convolutions in decoder order: each takes its old cache and leaves a new one."""

    def __init__(self, old_caches: tuple, is_last: bool):
        self.is_start, self.is_last = not old_caches, is_last
        self.old_caches = iter(old_caches) if old_caches else repeat(None)
        self.new_caches: list[torch.Tensor | None] = []

    def __call__(self, layer, x):
        cache = next(self.old_caches)
        if x.shape[2] == 0:  # the first latent alone has nothing for a temporal upsampler
            self.new_caches.append(cache)
            return x.new_empty(x.shape[0], layer.out_channels, *x.shape[2:])
        columns, _, rows, _, frames, _ = layer._padding
        assert frames == CACHE_T
        # Not `cat` with zeros, which would lose x's memory order.
        seen = F.pad(x, (0, 0, 0, 0, frames, 0)) if cache is None else torch.cat([cache, x], 2)
        if not self.is_last:
            self.new_caches.append(seen[:, :, -frames:].clone())  # a view would hold all frames
        return conv(seen, layer.weight, layer.bias, (0, rows, columns))


def _residual_block(block, x, causal):
    """Apply a Wan resnet. causal(layer, x) is a convolution with the cache of earlier chunks."""
    h = causal(block.conv1, norm_silu(block.norm1, x))
    h = causal(block.conv2, block.dropout(norm_silu(block.norm2, h)))
    return h + (x if isinstance(block.conv_shortcut, torch.nn.Identity) else _point_conv(block.conv_shortcut, x))


def _point_conv(layer, x):
    """Apply a 1x1x1 convolution."""
    return conv(x, layer.weight, layer.bias, (0, 0, 0))


def _upsample(resample, x, causal):
    """Upsample frames by 2 in space and, for mode upsample3d, in time."""
    if resample.mode == "upsample3d":
        x = _double_frames(resample.time_conv, x, causal)
    B, _, T = x.shape[:3]
    upsample, layer = resample.resample
    images = conv(upsample(x.transpose(1, 2).flatten(0, 1)), layer.weight, layer.bias, layer.padding)
    return images.unflatten(0, (B, T)).transpose(1, 2)


def _double_frames(time_conv, x, causal):
    """Double all frames but the video's first, which the convolution sees as zeros."""
    first, rest = (x[:, :, :1], x[:, :, 1:]) if causal.is_start else (None, x)
    pairs = causal(time_conv, rest).unflatten(1, (2, -1))
    doubled = torch.stack((pairs[:, 0], pairs[:, 1]), 3).flatten(2, 3)
    return doubled if first is None else torch.cat([first, doubled], 2)


def _check_vae(vae) -> None:
    """Raise ValueError for another architecture than Wan2.1's."""
    if vae.config.is_residual or vae.config.patch_size is not None:
        raise ValueError(
            f"VAE config has is_residual={vae.config.is_residual}, patch_size={vae.config.patch_size}, expected the "
            "Wan2.1 decoder (False, None); use that VAE"
        )


def _check_frames(first_frame: int, num_frames: int, available: int) -> None:
    """Raise ValueError unless 0 <= first_frame < num_frames <= available."""
    if not 1 <= num_frames <= available:
        raise ValueError(
            f"num_frames={num_frames}, expected 1 to {available}, as many as the latents have; ask for fewer frames "
            "or sample a longer video"
        )
    if not 0 <= first_frame < num_frames:
        raise ValueError(
            f"first_frame={first_frame}, expected 0 to {num_frames - 1} for num_frames={num_frames}; correct one of "
            "the two"
        )
