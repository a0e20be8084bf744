"""ContentV's denoiser: the SD3.5 joint transformer of diffusers with a 3-D patch embedding.

A subclass of `diffusers.SD3Transformer2DModel` with the state-dict keys of the published
ContentV-8B checkpoint (arXiv 2506.05343). Shape legend: B batch, C channels, T latent frames, H W
latent height and width, N = T*H*W/p^2 video tokens, L text tokens, D text width, P pooled text
width.
"""

import math
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_3d_sincos_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import RMSNorm
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import nn

from rlhf.device import is_plugin_device
from rlhf.execution.blocks import JOINT_BLOCK, BlockRunner
from rlhf.execution.collectives import Group, copy_to_group
from rlhf.execution.ulysses import SequenceShards

SPATIAL_INTERPOLATION_SCALE = 0.5
FIXED_BY_ARCHITECTURE = {"qk_norm": "rms_norm", "dual_attention_layers": []}
UNUSED_CONFIG_KEYS = ("sample_size", "pos_embed_max_size", "caption_projection_dim")
MAX_CACHED_TABLES = 2  # one is 202 MB in bf16 at 432x768 and 125 frames


class PatchEmbed3D(nn.Module):
    """Patches of latents (B, C, T, H, W) as tokens (B, N, width), plus 3-D sin-cos positions."""

    def __init__(self, patch_size: int, in_channels: int, width: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)
        self._tables: OrderedDict = OrderedDict()  # not a buffer: the checkpoint has no such key

    def forward(self, latents_BCTHW: torch.Tensor) -> torch.Tensor:
        """Return the tokens (B, N, width) of latents, positions added."""
        B, _, T, H, W = latents_BCTHW.shape
        frames = self.proj(latents_BCTHW.transpose(1, 2).flatten(0, 1))
        tokens = frames.flatten(2).unflatten(0, (B, T)).transpose(2, 3).flatten(1, 2).contiguous()
        return tokens + self.position_table((T, H // self.patch_size, W // self.patch_size), tokens)

    def position_table(self, grid: tuple[int, int, int], like: torch.Tensor) -> torch.Tensor:
        """Return the position embeddings (N, width) of a token grid (frames, rows, columns).

        It has the device and dtype of `like`. It is built in float64 on the CPU, which accelerators
        lack, and cached for the last few grids.
        """
        key = (grid, like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = _sincos_table(grid, like.shape[-1]).to(like.device, like.dtype)
            if len(self._tables) > MAX_CACHED_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]


def _sincos_table(grid: tuple[int, int, int], width: int) -> torch.Tensor:
    """Return the 3-D sin-cos position embeddings (N, width) of a token grid, on the CPU."""
    frames, rows, columns = grid
    table = get_3d_sincos_pos_embed(
        embed_dim=width,
        spatial_size=(columns, rows),
        temporal_size=frames,
        spatial_interpolation_scale=SPATIAL_INTERPOLATION_SCALE,
        device=torch.device("cpu"),
    )
    return table.flatten(0, 1)


class QueryKeyNorm(RMSNorm):
    """The parent's RMS norm in one kernel.

    The parent runs several kernels, or a plug-in's, even for tensors of another device.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return queries or keys after the RMS norm, in the dtype of the weight."""
        if is_plugin_device(hidden_states.device):
            return super().forward(hidden_states)
        weight = self.weight.to(hidden_states.dtype)
        return F.rms_norm(hidden_states, weight.shape, weight, self.eps).to(self.weight.dtype)


class SD3Transformer3DModel(SD3Transformer2DModel):
    """The velocity of a video latent under a text condition. The default sizes are ContentV-8B's.

    Args:
        in_channels, out_channels: channels of the latents; 16 for the Wan2.1 VAE.
        patch_size: edge of a spatial patch, in latent pixels.
        num_layers: joint attention blocks; the last has no text output.
        num_attention_heads, attention_head_dim: their product is the width, a multiple of 16.
        joint_attention_dim: width D of the text tokens.
        pooled_projection_dim: width P of the pooled text.
    """

    _no_split_modules = ["JointTransformerBlock", "PatchEmbed3D"]
    block_parts = JOINT_BLOCK

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int = 16,
        patch_size: int = 2,
        num_layers: int = 38,
        num_attention_heads: int = 38,
        attention_head_dim: int = 64,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 2048,
    ):
        width = num_attention_heads * attention_head_dim
        if width % 16:
            raise ValueError(
                f"num_attention_heads={num_attention_heads} times attention_head_dim={attention_head_dim} is {width}, "
                "expected a multiple of 16 for the 3-D position table; change one of the two"
            )
        sizes = {key: value for key, value in self.config.items() if not key.startswith("_")}
        table = {"sample_size": patch_size, "pos_embed_max_size": 1}  # a 1x1 2-D table, replaced below
        fixed = {"caption_projection_dim": width, "qk_norm": "rms_norm"}
        # The undecorated parent, because its config would list keys other than the sizes above.
        SD3Transformer2DModel.__init__.__wrapped__(self, **sizes, **table, **fixed)
        self.pos_embed = PatchEmbed3D(patch_size, in_channels, width)
        self.run_block: BlockRunner | None = None  # None: blocks run as in diffusers
        self.sequence_group: Group | None = None  # ranks that share the tokens; needs a run_block
        for block in self.transformer_blocks:
            for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                norm = getattr(block.attn, name)
                setattr(block.attn, name, QueryKeyNorm(attention_head_dim, norm.eps))

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Read a config of this class, or of diffusers' class as the published checkpoint has it.

        Returns what diffusers' method returns. Raises ValueError for another architecture.
        """
        config_dict = {key: value for key, value in config_dict.items() if key not in UNUSED_CONFIG_KEYS}
        for key, expected in FIXED_BY_ARCHITECTURE.items():
            got = config_dict.pop(key, expected)
            if got not in (expected, ()):
                raise ValueError(
                    f"transformer config has {key}={got!r}, expected {expected!r}: this is not a ContentV checkpoint; "
                    "pass the path or hub id of one"
                )
        return super().extract_init_dict(config_dict, **kwargs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Return the velocity (B, C, T, H, W) of latents of that shape.

        Args:
            hidden_states: noisy latents (B, C, T, H, W); H and W multiples of the patch size.
            encoder_hidden_states: text tokens (B, L, D).
            pooled_projections: pooled text (B, P).
            timestep: (B,), sigma * 1000, in [0, 1000].
            joint_attention_kwargs: `{"scale": s}` multiplies every LoRA layer by s. Other keys go
                to the attention processors, which a `run_block` does not use.

        Raises:
            ValueError: latents of another rank or size; a LoRA scale with gradient checkpointing.
        """
        self._check_latents(hidden_states)
        attention_kwargs = dict(joint_attention_kwargs or {})
        lora_scale = attention_kwargs.pop("scale", 1.0)
        self._check_lora_scale(lora_scale)
        scale_lora_layers(self, lora_scale)
        try:
            inputs = hidden_states, encoder_hidden_states, pooled_projections, timestep
            sample = self._velocity(*inputs, attention_kwargs)
        finally:
            unscale_lora_layers(self, lora_scale)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _velocity(self, latents_BCTHW, text_BLD, pooled_BP, timestep_B, attention_kwargs):
        """Return the velocity (B, C, T, H, W); `run_block`, if set, runs each block."""
        group, run_block, shards = self.sequence_group, self.run_block, None
        if group is None:
            video = self.pos_embed(latents_BCTHW)
        else:  # each rank of the group computes with a part of the tokens
            video = self.pos_embed(copy_to_group(latents_BCTHW, group))
            shards = SequenceShards(group, video.shape[1], self.config.num_attention_heads)
            video, run_block = shards.split(video), run_block.with_shards(shards)
        temb = self.time_text_embed(timestep_B, pooled_BP)
        text = self.context_embedder(text_BLD)
        for block in self.transformer_blocks:
            if run_block is not None:
                text, video = run_block(block, video, text, temb)
            elif torch.is_grad_enabled() and self.gradient_checkpointing:
                text, video = self._gradient_checkpointing_func(block, video, text, temb, attention_kwargs)
            else:
                text, video = block(video, text, temb, attention_kwargs)
        patches = self.proj_out(self.norm_out(video, temb))
        return self._unpatchify(patches if shards is None else shards.join(patches), latents_BCTHW.shape)

    def _unpatchify(self, patches_BNK: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Return latents (B, C, T, H, W) of patches (B, N, p*p*C), whose channels come last."""
        B, _, T, H, W = shape
        p = self.config.patch_size
        patches = patches_BNK.view(B, T, H // p, W // p, p, p, self.out_channels)
        return torch.einsum("bthwpqc->bcthpwq", patches).reshape(B, self.out_channels, T, H, W)

    def position_bytes(self, tokens: int) -> int:
        """Return the bytes of the position table that `pos_embed` keeps."""
        return tokens * self.inner_dim * self.dtype.itemsize

    def trace_inputs(
        self, batch: int, latent_shape: tuple[int, int, int, int], text_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return text, pooled text and timesteps on "meta"; put a position table there, too."""
        make, config, p = partial(torch.empty, device="meta", dtype=self.dtype), self.config, self.config.patch_size
        _, T, H, W = latent_shape
        grid = (T, H // p, W // p)
        self.pos_embed._tables.clear()
        self.pos_embed._tables[grid, torch.device("meta"), self.dtype] = make(math.prod(grid), self.inner_dim)
        text, pooled = (batch, text_tokens, config.joint_attention_dim), (batch, config.pooled_projection_dim)
        return make(text), make(pooled), torch.empty(batch, device="meta")

    def _check_latents(self, latents: torch.Tensor) -> None:
        """Raise ValueError unless latents are 5-d with sides divisible by the patch size."""
        p = self.config.patch_size
        if latents.ndim != 5 or latents.shape[-2] % p or latents.shape[-1] % p:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, expected (batch, channels, frames, height, width) with "
                f"height and width divisible by the patch size {p}; choose a video size divisible by {8 * p}"
            )

    def _check_lora_scale(self, scale: float) -> None:
        """Raise ValueError for a LoRA scale other than 1 if blocks are recomputed."""
        recomputes = self.gradient_checkpointing or (self.run_block and self.run_block.recompute != "nothing")
        if scale != 1.0 and recomputes and torch.is_grad_enabled():
            raise ValueError(
                f"joint_attention_kwargs has scale={scale} while gradient checkpointing is on, expected no scale: "
                "blocks are recomputed after the scale is undone, so LoRA gradients would be wrong; set the scale "
                "with set_adapters(name, weight) or disable gradient checkpointing"
            )
