"""One video's tokens over several processes: each holds a part of the tokens, and attends with a part of the heads.

DeepSpeed-Ulysses (arXiv 2309.14509) for joint attention: before the attention, processes swap tokens for heads; after
it, heads for tokens. Text is short: every process holds all of it and computes it for itself. Heads are padded with
zeros to a multiple of the number of processes, and so are the tokens, which padding never attends to.

Shape legend: B batch, N video tokens, n those of one process, L text tokens, D width, H heads, h those of one process,
W width of a head, K numbers of a patch, S processes.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from rlhf.exchange import Group, gathered, gathered_inside, swapped


@dataclass(frozen=True)
class Shards:
    """How the tokens and heads of one forward pass are divided."""

    group: Group
    tokens: int  # N
    heads: int  # H

    @property
    def size(self) -> int:
        """S, the number of processes."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return dist.get_rank(self.group)

    @property
    def own_tokens(self) -> int:
        """n, padding included."""
        return -(-self.tokens // self.size)

    @property
    def own_heads(self) -> int:
        """h, padding included."""
        return -(-self.heads // self.size)

    def own(self, video_BND: torch.Tensor) -> torch.Tensor:
        """This process's part of the tokens (B, n, D), of all of them."""
        missing = self.size * self.own_tokens - self.tokens
        return F.pad(video_BND, (0, 0, 0, missing)).chunk(self.size, 1)[self.rank].contiguous()

    def whole(self, patches_BnK: torch.Tensor) -> torch.Tensor:
        """All tokens (B, N, K) of each process's."""
        return gathered(patches_BnK, self.group).transpose(0, 1).flatten(1, 2)[:, : self.tokens]

    def by_heads(self, *tensors_BHnLW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Own tokens and the text with all heads, (B, H, n + L, W) each, to everything with own heads (B, h, N + L, W).

        All in one exchange.
        """
        every = F.pad(torch.stack(tensors_BHnLW), (0, 0, 0, 0, 0, self.size * self.own_heads - self.heads))
        video, text = every[..., : self.own_tokens, :], every[..., self.own_tokens :, :]
        video = swapped(video.unflatten(2, (self.size, self.own_heads)).movedim(2, 0), self.group)  # (S, 3, B, h, n, W)
        video = video.movedim(0, 3).flatten(3, 4)[..., : self.tokens, :]
        text = text.unflatten(2, (self.size, self.own_heads))[:, :, self.rank]
        return torch.cat([video, text], 3).unbind(0)

    def by_tokens(self, attended_BhNLW: torch.Tensor) -> torch.Tensor:
        """The way back: (B, h, N + L, W) to (B, H, n + L, W)."""
        video, text = attended_BhNLW[:, :, : self.tokens], attended_BhNLW[:, :, self.tokens :]
        video = F.pad(video, (0, 0, 0, self.size * self.own_tokens - self.tokens))
        video = swapped(video.unflatten(2, (self.size, self.own_tokens)).movedim(2, 0), self.group)  # (S, B, h, n, W)
        both = torch.cat([video, gathered_inside(text, self.group)], 3)
        return both.transpose(0, 1).flatten(1, 2)[:, : self.heads]
