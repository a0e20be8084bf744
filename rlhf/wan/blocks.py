"""Wan's transformer block in parts, for `rlhf.execution.blocks`.

Self-attention of the video's tokens with rotary positions, cross-attention to the text, and a
feed-forward layer (arXiv 2503.20314, section 4.2.2). Sums and norms are float32 at least.
Shape legend: B batch, N video tokens, L text tokens, D width, H heads, W width of a head.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from rlhf.execution.attention import Attention
from rlhf.execution.blocks import BlockParts


def before_attention(
    block,
    video_BND: torch.Tensor,
    text_BLD: torch.Tensor,
    temb_B6D: torch.Tensor,
    cos_1NW: torch.Tensor,
    sin_1NW: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Return query, key and value (B, H, N, W), and four gates (B, 1, D) for `after_attention`."""
    shift, scale, *gates = (block.scale_shift_table + at_least_float32(temb_B6D)).chunk(6, 1)
    x = modulate(block.norm1, video_BND, shift, scale)
    attn, heads = block.attn1, (block.attn1.heads, -1)
    query = rotate(attn.norm_q(attn.to_q(x)).unflatten(-1, heads), cos_1NW, sin_1NW)
    key = rotate(attn.norm_k(attn.to_k(x)).unflatten(-1, heads), cos_1NW, sin_1NW)
    value = attn.to_v(x).unflatten(-1, heads)
    return *(tensor.transpose(1, 2) for tensor in (query, key, value)), *gates


def after_attention(
    block,
    attended_BHNW: torch.Tensor,
    video_BND: torch.Tensor,
    text_BLD: torch.Tensor,
    *gates_B1D: torch.Tensor,
    attention: Attention,
) -> tuple[None, torch.Tensor]:
    """Return None, since no block changes the text, and the video's tokens (B, N, D)."""
    gate, shift, scale, feed_forward_gate = gates_B1D
    attended = _project_out(block.attn1, attended_BHNW)
    video = (at_least_float32(video_BND) + attended * gate).type_as(video_BND)
    x = video if isinstance(block.norm2, torch.nn.Identity) else layer_norm(block.norm2, video).type_as(video)
    video = video + _cross_attention(block.attn2, x, text_BLD, attention)
    x = block.ffn(modulate(block.norm3, video, shift, scale))
    return None, (at_least_float32(video) + at_least_float32(x) * feed_forward_gate).type_as(video)


def _cross_attention(attn, x_BND: torch.Tensor, text_BLD: torch.Tensor, attention: Attention) -> torch.Tensor:
    """Return the output of cross-attention (B, N, D): video queries, text keys and values."""
    query, key = attn.norm_q(attn.to_q(x_BND)), attn.norm_k(attn.to_k(text_BLD))
    qkv = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (query, key, attn.to_v(text_BLD)))
    return _project_out(attn, attention(*qkv))


def _project_out(attn, attended_BHNW: torch.Tensor) -> torch.Tensor:
    """Join the heads and apply the output projection; return (B, N, D)."""
    return attn.to_out[1](attn.to_out[0](attended_BHNW.transpose(1, 2).flatten(2)))


def rotate(x_BNHW: torch.Tensor, cos_1NW: torch.Tensor, sin_1NW: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of each head by their positions' angles (arXiv 2104.09864).

    cos and sin have each angle twice.
    """
    x1, x2 = x_BNHW.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_1NW[..., 0::2].unsqueeze(2), sin_1NW[..., 1::2].unsqueeze(2)
    return torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1).flatten(-2).type_as(x_BNHW)


def modulate(norm, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return norm(x) (1 + scale) + shift in the dtype of x."""
    return (layer_norm(norm, x) * (1 + scale) + shift).type_as(x)


def layer_norm(norm: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """Return the layer norm of x in float32, float64 for float64."""
    x = at_least_float32(x)
    weight, bias = (None if p is None else p.to(x.dtype) for p in (norm.weight, norm.bias))
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return x in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _modulation(block) -> Iterator[torch.nn.Parameter]:
    """Yield the parameters that the gates read, besides the timestep's embedding."""
    yield block.scale_shift_table


WAN_BLOCK = BlockParts(before_attention, after_attention, lambda block: False, _modulation)
