"""The first blocks of a generator's transformer, frozen: features of noisy latents.

Shape legend: B batch, C channels, T latent frames, H W latent height and width, N video tokens,
L text tokens, D text width, P pooled text width, E width of the transformer.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn

from rlhf.execution.blocks import BlockRunner
from rlhf.generator.files import model_folder, model_sizes
from rlhf.generator.flow import NUM_TRAIN_TIMESTEPS
from rlhf.generator.loading import default_dtype
from rlhf.generator.registry import family_of_config
from rlhf.io import file_errors


class _Recorder(BlockRunner):
    """A way to run blocks that keeps the video tokens of the last one."""

    video_BNE: torch.Tensor | None = None

    def __call__(self, block, video, text, temb, *constants):
        """Run a block as `BlockRunner` does."""
        text, self.video_BNE = super().__call__(block, video, text, temb, *constants)
        return text, self.video_BNE


class FirstBlocks(nn.Module):
    """The tokens (B, N, E) of latents (B, C, T, H, W) after the first blocks of a transformer.

    Args:
        transformer: with these blocks alone, as `first_blocks` returns it.
        recompute: compute each block again in the backward pass, which then keeps its input alone.
    """

    def __init__(self, transformer: nn.Module, recompute: bool = True):
        super().__init__()
        self.transformer = transformer.requires_grad_(False).eval()
        how = {"recompute": "block" if recompute else "nothing", "parts": transformer.block_parts}
        transformer.run_block = self.runner = _Recorder(**how)

    @property
    def width(self) -> int:
        """E."""
        config = self.transformer.config
        return config.num_attention_heads * config.attention_head_dim

    def forward(
        self, latents_BCTHW: torch.Tensor, sigma: float, text_BLD: torch.Tensor, pooled_BP: torch.Tensor
    ) -> torch.Tensor:
        """Return the tokens (B, N, E) in the transformer's dtype. sigma: in [0, 1]."""
        dtype, batch = self.transformer.dtype, len(latents_BCTHW)
        time_B = torch.full((batch,), sigma * NUM_TRAIN_TIMESTEPS, device=latents_BCTHW.device)
        self.transformer(latents_BCTHW.to(dtype), text_BLD.to(dtype), pooled_BP.to(dtype), time_B, return_dict=False)
        tokens, self.runner.video_BNE = self.runner.video_BNE, None
        return tokens


def first_blocks(config: dict[str, Any], count: int) -> nn.Module:
    """Return a transformer of this config cut to its first blocks, without weights ("meta").

    Raises ValueError for a count that the transformer does not have.
    """
    if not 1 <= count <= config["num_layers"]:
        raise ValueError(
            f"blocks: got {count}, expected 1 to {config['num_layers']}, as many as the transformer has; correct it"
        )
    longer = config | {"num_layers": min(count + 1, config["num_layers"])}  # the last block may have another form
    with init_empty_weights(include_buffers=False):
        model = family_of_config(config).classes.transformer.from_config(longer)
    del model.transformer_blocks[count:]
    return model


def load_first_blocks(model: str | Path, count: int, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the first blocks of a model's transformer on the CPU; the others are not read.

    Args:
        model: as for `load_pipeline`.
        dtype: default: as `load_pipeline`.

    Raises:
        ValueError: no such model, or weights that are missing.
    """
    folder = model_folder(model)
    cut = first_blocks(model_sizes(folder)["transformer"], count)
    dtype, wanted, weights = dtype or default_dtype(folder), set(cut.state_dict()), {}
    in_float32 = set(cut._keep_in_fp32_modules or ())  # as diffusers loads the whole model
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        with file_errors(path), safe_open(path, "pt") as file:
            for name in wanted.intersection(file.keys()):
                kept = not in_float32.isdisjoint(name.split("."))
                weights[name] = file.get_tensor(name).to(torch.float32 if kept else dtype)
    if missing := sorted(wanted - set(weights)):
        raise ValueError(
            f"{folder / 'transformer'}: got weights without {missing[0]}, expected those of a whole transformer; "
            "download or copy the model again"
        )
    cut.load_state_dict(weights, assign=True)
    return cut.requires_grad_(False).eval()
