"""Differentiable decoding of Wan2.1 latents with functional causal caches.

`AutoencoderKLWan.decode` walks through the latents one by one and keeps the last frames seen by every causal
convolution in a list that it mutates, so no part of it can be recomputed in a backward pass. Here these caches are
tensors that go in and come out of a pure function over the very same modules: a chunk of latents of any length gives
the same frames, and can be run again. Tiling and slicing settings of the VAE are not looked at.

Shape legend: B batch, C channels, T latent frames or frames, H W height and width.
"""

import math
from functools import partial
from itertools import repeat

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import CACHE_T

from rlhf.contentv.frozen import conv, norm_silu
from rlhf.host_memory import HostMemory
from rlhf.recompute import recomputed

CACHES = ("keep", "recompute")


def decode_video(
    vae: AutoencoderKLWan,
    latents_BCTHW: torch.Tensor,
    num_frames: int | None = None,
    chunk: int | None = None,
    checkpoint: bool = False,
    first_frame: int = 0,
    caches: str | HostMemory = "keep",
) -> torch.Tensor:
    """Video (B, 3, frames, 8H, 8W) in [0, 1], float32, of normalised latents (B, C, T, H, W).

    Args:
        latents_BCTHW: what the transformer sees; un-normalised here by the VAE's `latents_mean` and `latents_std`.
        num_frames: leading frames wanted, None for all 4(T-1)+1. Only the latents that these depend on are decoded.
        chunk: latents decoded at a time, None for all at once. Any value gives the same video.
        checkpoint: run each chunk again in the backward pass instead of keeping its activations.
        first_frame: the frames before it are left out; the rest is unchanged. Their latents are decoded without
            gradient, so what these latents mean for later frames is not in the gradient: with more than 0, not exact.
        caches: with checkpoint, where the caches between the chunks wait for the backward pass: "keep" on the device;
            "recompute" keeps only those between groups of chunks, about the square root of their number, and decodes
            once more; a `HostMemory` holds them all.

    The clamp to [0, 1] passes gradients straight through: a saturated pixel still pulls. See `saturated_share`.
    """
    _check_vae(vae)
    per_latent = 2 ** sum(vae.config.temperal_downsample)
    num_frames = _check_num_frames(num_frames, latents_BCTHW.shape[2], per_latent)
    _check_choices(first_frame, num_frames, caches)
    first, last = (-(-frame // per_latent) for frame in (first_frame, num_frames - 1))  # latents of these two frames
    latents = unnormalise(vae, latents_BCTHW[:, :, : last + 1]).to(vae.dtype)
    video = decode_unclamped(vae, latents, first, chunk, checkpoint, caches)
    start = per_latent * (first - 1) + 1 if first else 0  # the first frame of the first latent
    video = video[:, :, first_frame - start : num_frames - start]
    video = video.to(torch.promote_types(video.dtype, torch.float32))
    return (_ClampStraightThrough.apply(video) + 1) / 2


def unnormalise(vae: AutoencoderKLWan, latents_BCTHW: torch.Tensor) -> torch.Tensor:
    """Latents of unit variance to the VAE's own scale: x * std + mean per channel."""
    mean, std = (
        torch.tensor(values, dtype=latents_BCTHW.dtype, device=latents_BCTHW.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return latents_BCTHW * std + mean


def saturated_share(video_BCTHW: torch.Tensor) -> torch.Tensor:
    """(B,) share of the numbers of a decoded video that were clamped: these pull, but do not follow."""
    with torch.no_grad():
        return ((video_BCTHW <= 0) | (video_BCTHW >= 1)).float().mean((1, 2, 3, 4))


def use_channels_last(vae: AutoencoderKLWan) -> None:
    """Order the decoder's weights so that channels are innermost, which some devices' convolutions prefer. In place."""
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
    caches: str | HostMemory = "keep",
) -> torch.Tensor:
    """Frames in about [-1, 1] of latents on the VAE's own scale, from latent number `first` on; see `decode_video`."""
    x = _point_conv(vae.post_quant_conv, latents_BCTHW)
    chunk, warm = chunk or x.shape[2], ()
    with torch.no_grad():
        for piece in x[:, :, :first].split(chunk, 2) if first else ():  # an empty tensor splits into one
            _, *warm = _decode_chunk(vae.decoder, piece, *warm)
    x = x[:, :, first:]
    num_chunks = -(-x.shape[2] // chunk)
    grouped = checkpoint and caches == "recompute"
    sizes = [chunk * math.isqrt(num_chunks), chunk] if grouped else [chunk] if checkpoint or num_chunks > 1 else []
    run = _again(vae.decoder, caches) if checkpoint else _once
    frames, *_ = _decode_pieces(vae.decoder, run, sizes, True, x, *warm)
    return frames


def _decode_pieces(decoder, run, sizes: list[int], is_last: bool, x, *old):
    """Latents in pieces of sizes[0], these in pieces of the next size, and so on; as `_decode_chunk`."""
    if not sizes:
        return _decode_chunk(decoder, x, *old, is_last=is_last)
    frames, pieces = [], x.split(sizes[0], 2)
    for i, piece in enumerate(pieces):
        last = is_last and i == len(pieces) - 1
        y, *old = run(partial(_decode_pieces, decoder, run, sizes[1:], last), piece, *old)
        frames.append(y)
    return torch.cat(frames, 2), *old


def _once(function, *tensors):
    return function(*tensors)


def _again(decoder, caches):
    """Runs a function such that the backward pass runs it again."""
    trained = [p for p in decoder.parameters() if p.requires_grad]

    def run(function, *tensors):
        place = caches.group() if isinstance(caches, HostMemory) else None
        return recomputed(function, *tensors, parameters=trained, place=place)

    return run


def _decode_chunk(decoder, x, *old_caches, is_last: bool = False):
    """Consecutive latents and the caches left by those before (none: the video starts here) -> frames, new caches."""
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
    """Applies causal convolutions in decoder order, taking each one's cache and collecting the next."""

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
    h = causal(block.conv1, norm_silu(block.norm1, x))
    h = causal(block.conv2, block.dropout(norm_silu(block.norm2, h)))
    return h + (x if isinstance(block.conv_shortcut, torch.nn.Identity) else _point_conv(block.conv_shortcut, x))


def _point_conv(layer, x):
    """A convolution that sees one pixel at a time."""
    return conv(x, layer.weight, layer.bias, (0, 0, 0))


def _upsample(resample, x, causal):
    if resample.mode == "upsample3d":
        x = _double_frames(resample.time_conv, x, causal)
    B, _, T = x.shape[:3]
    upsample, layer = resample.resample
    images = conv(upsample(x.transpose(1, 2).flatten(0, 1)), layer.weight, layer.bias, layer.padding)
    return images.unflatten(0, (B, T)).transpose(1, 2)


def _double_frames(time_conv, x, causal):
    """Every frame but the video's first becomes two; the convolution sees zeros in place of that first frame."""
    first, rest = (x[:, :, :1], x[:, :, 1:]) if causal.is_start else (None, x)
    pairs = causal(time_conv, rest).unflatten(1, (2, -1))
    doubled = torch.stack((pairs[:, 0], pairs[:, 1]), 3).flatten(2, 3)
    return doubled if first is None else torch.cat([first, doubled], 2)


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


def _check_choices(first_frame: int, num_frames: int, caches) -> None:
    if not 0 <= first_frame < num_frames:
        raise ValueError(
            f"first_frame={first_frame}, expected 0 to {num_frames - 1} for num_frames={num_frames}; correct one of "
            "the two"
        )
    if caches not in CACHES and not isinstance(caches, HostMemory):
        raise ValueError(f"caches={caches!r}, expected {', '.join(CACHES)} or a HostMemory; choose one of these")
