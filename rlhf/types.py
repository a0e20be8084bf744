"""Tensors that modules exchange: shapes, ranges and units, stated once.

Shape legend, used as suffixes of names: B batch, C channels, T frames (of video or of latents),
H height, W width, L text tokens, D text width, P pooled text width.

video_BCTHW    float32, RGB in [0, 1]
latents_BCTHW  float32, normalised to about unit variance (the transformer's input)
scores_B       float32, higher is better
sigma          0-d float32, noise level: 1 is pure noise, 0 is data
"""

from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True)
class Conditioning:
    """Text embeddings of a batch of prompts and, for guidance, of the negative prompt."""

    prompt_embeds_BLD: torch.Tensor
    pooled_embeds_BP: torch.Tensor
    negative_embeds_BLD: torch.Tensor | None = None
    negative_pooled_BP: torch.Tensor | None = None

    @property
    def negative(self) -> "Conditioning":
        """Return the negative prompt's embeddings, for the negative branch of guidance."""
        return Conditioning(self.negative_embeds_BLD, self.negative_pooled_BP)

    def to(self, *args: Any, **kwargs: Any) -> "Conditioning":
        """Move or cast every tensor, as `torch.Tensor.to` does."""
        values = (getattr(self, f.name) for f in fields(self))
        return Conditioning(*(None if v is None else v.to(*args, **kwargs) for v in values))


class _ClampStraightThrough(torch.autograd.Function):
    """A clamp whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx, x, low, high):
        """Clamp to [low, high]."""
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def clamp_straight_through(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Clamp x to [low, high] with the gradient of the identity: a saturated value has one."""
    return _ClampStraightThrough.apply(x, low, high)
