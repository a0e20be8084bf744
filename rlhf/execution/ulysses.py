"""Ulysses sequence parallelism: one video's tokens over several ranks, each with some of the heads.

DeepSpeed-Ulysses (arXiv 2309.14509) for joint attention. Before the attention, ranks exchange
tokens for heads; after it, heads for tokens. Every rank computes all of the text, which is short.
Heads and tokens are padded with zeros to a multiple of the number of ranks; the attention never
sees padded tokens.

Shape legend: B batch, N video tokens, n those of one rank, L text tokens, D width, H heads, h those
of one rank, W width of a head, K numbers of a patch, S ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from rlhf.execution.collectives import Group, all_gather, all_gather_sum_grad, all_to_all


@dataclass
class SequenceShards:
    """The division of one forward pass's tokens and heads over the ranks of a group."""

    group: Group
    tokens: int  # N
    heads: int  # H

    def __post_init__(self):
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)  # S
        self.local_tokens = -(-self.tokens // self.size)  # n, with padding
        self.local_heads = -(-self.heads // self.size)  # h, with padding

    def split(self, video_BND: torch.Tensor) -> torch.Tensor:
        """Return this rank's tokens (B, n, D)."""
        missing = self.size * self.local_tokens - self.tokens
        return F.pad(video_BND, (0, 0, 0, missing)).chunk(self.size, 1)[self.rank].contiguous()

    def join(self, patches_BnK: torch.Tensor) -> torch.Tensor:
        """Return the tokens (B, N, K) of all ranks."""
        return all_gather(patches_BnK, self.group).transpose(0, 1).flatten(1, 2)[:, : self.tokens]

    def to_heads(self, *tensors_BHnLW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Exchange tokens for heads, all tensors at once: (B, H, n + L, W) to (B, h, N + L, W)."""
        padding = self.size * self.local_heads - self.heads
        stacked = F.pad(torch.stack(tensors_BHnLW), (0, 0, 0, 0, 0, padding))
        video, text = stacked[..., : self.local_tokens, :], stacked[..., self.local_tokens :, :]
        video = video.unflatten(2, (self.size, self.local_heads)).movedim(2, 0)
        video = all_to_all(video, self.group)  # (S, 3, B, h, n, W)
        video = video.movedim(0, 3).flatten(3, 4)[..., : self.tokens, :]
        text = text.unflatten(2, (self.size, self.local_heads))[:, :, self.rank]
        return torch.cat([video, text], 3).unbind(0)

    def to_tokens(self, attended_BhNLW: torch.Tensor) -> torch.Tensor:
        """Exchange heads for tokens: (B, h, N + L, W) to (B, H, n + L, W)."""
        video, text = attended_BhNLW[:, :, : self.tokens], attended_BhNLW[:, :, self.tokens :]
        video = F.pad(video, (0, 0, 0, self.size * self.local_tokens - self.tokens))
        video = video.unflatten(2, (self.size, self.local_tokens)).movedim(2, 0)
        video = all_to_all(video, self.group)  # (S, B, h, n, W)
        both = torch.cat([video, all_gather_sum_grad(text, self.group)], 3)
        return both.transpose(0, 1).flatten(1, 2)[:, : self.heads]
