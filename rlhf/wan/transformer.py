"""Wan 2.1's denoiser: diffusers' transformer, whose blocks run by `rlhf.execution.blocks`.

Shape legend: B batch, C channels, T latent frames, H W latent height and width, L text tokens, D
text width.
"""

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from rlhf.execution.blocks import BlockRunner
from rlhf.execution.collectives import Group, copy_to_group
from rlhf.execution.ulysses import SequenceShards
from rlhf.wan.blocks import WAN_BLOCK, layer_norm


class WanTransformer3DModel(diffusers.WanTransformer3DModel):
    """The velocity of a video latent under a text condition, with the parent's weights and sizes.

    Text to video only: the parent's image embeddings are not read.
    """

    block_parts = WAN_BLOCK
    sequence_group: Group | None = None  # ranks that share the tokens; needs a run_block
    run_block: BlockRunner | None = None  # None: PyTorch's attention, and no recomputation
    _supports_gradient_checkpointing = False  # by `run_block` instead

    @property
    def transformer_blocks(self) -> nn.ModuleList:
        """The blocks, by the name that all generators have."""
        return self.blocks

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Return the velocity (B, C, T, H, W) of latents of that shape.

        Args:
            hidden_states: noisy latents (B, C, T, H, W); H and W multiples of the patch size 2.
            encoder_hidden_states: text tokens (B, L, D), zero behind the prompt's.
            pooled_projections: not read; Wan has none.
            timestep: (B,), sigma * 1000, in [0, 1000].
            joint_attention_kwargs, attention_kwargs: None or empty.

        Raises:
            ValueError: latents of another rank or size; attention_kwargs.
        """
        self._check(hidden_states, joint_attention_kwargs or attention_kwargs)
        group, run_block, shards = self.sequence_group, self.run_block or BlockRunner(parts=WAN_BLOCK), None
        rotations = [table.squeeze(2) for table in self.rope(hidden_states)]  # (1, N, W)
        latents = hidden_states if group is None else copy_to_group(hidden_states, group)
        video = self.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
        if group is not None:  # each rank of the group computes with a part of the video's tokens
            shards = SequenceShards(group, video.shape[1], self.config.num_attention_heads)
            video, *rotations = (shards.split(x) for x in (video, *rotations))
            run_block = run_block.with_shards(shards)
        temb, modulation, text, _ = self.condition_embedder(timestep, encoder_hidden_states)
        modulation = modulation.unflatten(1, (6, -1))
        for block in self.blocks:
            _, video = run_block(block, video, text, modulation, *rotations)
        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, 1)
        patches = self.proj_out((layer_norm(self.norm_out, video) * (1 + scale) + shift).type_as(video))
        sample = self._unpatchify(patches if shards is None else shards.join(patches), hidden_states.shape)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _unpatchify(self, patches_BNK: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Return latents (B, C, T, H, W) of patches (B, N, pt*p*p*C), whose channels come last."""
        B, _, T, H, W = shape
        pt, ph, pw = self.config.patch_size
        patches = patches_BNK.view(B, T // pt, H // ph, W // pw, pt, ph, pw, -1)
        return torch.einsum("bthwqrsc->bctqhrws", patches).reshape(B, -1, T, H, W)

    def _check(self, latents: torch.Tensor, attention_kwargs: dict[str, Any] | None) -> None:
        """Raise ValueError for latents that do not divide into patches, and for a LoRA scale."""
        p = self.config.patch_size[-1]  # in time it is 1
        if latents.ndim != 5 or latents.shape[-2] % p or latents.shape[-1] % p:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, expected (batch, channels, frames, height, width) with "
                f"height and width divisible by the patch size {p}; choose a video size divisible by {8 * p}"
            )
        if attention_kwargs:
            raise ValueError(
                f"attention_kwargs: got {attention_kwargs}, expected none; scale a LoRA by set_adapters(name, weight)"
            )

    def position_bytes(self, tokens: int) -> int:
        """Return 0: rotations are made in each call."""
        return 0

    def trace_inputs(
        self, batch: int, latent_shape: tuple[int, int, int, int], text_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return text, pooled text and timesteps on "meta"."""
        make = partial(torch.empty, device="meta", dtype=self.dtype)
        text = make(batch, text_tokens, self.config.text_dim)
        return text, make(batch, 0), torch.empty(batch, device="meta")
