"""A float8 copy of the adapted transformer for no-grad steps.

It shares all weights but those of the rounded layers with the trained transformer, whose base stays
as it was loaded. Not exact: float8 keeps three bits of the mantissa.
"""

import copy
from itertools import chain

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from rlhf.config import ConfigError

FLOAT8 = torch.float8_e4m3fn


class Float8Copy:
    """A float8 copy of a transformer, to sample from without gradient. `model` is the copy.

    Layers with an adapter, and the blocks' attention and feed-forward layers, multiply in float8,
    with a scale for each token and each output. Layers of sizes that float8 does not take stay as
    they are. Call `refresh` after each optimizer step.

    Raises ConfigError if the device has no float8 products, and for another adapter than plain
    LoRA.
    """

    def __init__(self, transformer: nn.Module):
        require_float8(transformer.device)
        self.model = _sharing_copy(transformer)
        self.layers: list[tuple[Float8Linear, nn.Linear | LoraLayer]] = []  # with the source of the weight
        blocks = next(n for n, child in transformer.named_children() if child is transformer.transformer_blocks)
        for name, source in transformer.named_modules():
            if _is_rounded(name, source, blocks):
                self.layers.append((Float8Linear(getattr(source, "base_layer", source)), source))
                self.model.set_submodule(name, self.layers[-1][0])
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Merge the adapter's current weights into the copy."""
        for layer, source in self.layers:
            layer.set_weight(merged_weight(source))


def _is_rounded(name: str, module: nn.Module, blocks: str) -> bool:
    if isinstance(module, LoraLayer):
        return _fits(module.base_layer)
    is_product = isinstance(module, nn.Linear) and name.startswith(f"{blocks}.")
    # Modulation (".norm") has one row: nothing to gain. The other two are inside a LoraLayer.
    return is_product and _fits(module) and not any(part in name for part in (".norm", ".base_layer", ".lora_"))


def _fits(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and layer.in_features % 16 == 0 and layer.out_features % 16 == 0


class Float8Linear(nn.Module):
    """A linear layer that multiplies in float8, with one scale a row of either factor."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.bias = base.bias
        self.register_buffer("weight", torch.empty_like(base.weight, dtype=FLOAT8))
        self.register_buffer("scale", torch.empty(1, base.out_features, device=base.weight.device))

    def set_weight(self, weight: torch.Tensor) -> None:
        """Store a float32 weight in float8, with a scale for each output."""
        rounded, scale = to_float8(weight)
        self.weight.copy_(rounded)
        self.scale.copy_(scale.T)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b, with x rounded to float8 first."""
        rows, scale = to_float8(x.flatten(0, -2))
        y = torch._scaled_mm(rows, self.weight.t(), scale, self.scale, out_dtype=x.dtype)
        y = y.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def to_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x (R, K) in float8 and its float32 scales (R, 1), whose product is about x."""
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / torch.finfo(FLOAT8).max
    return (x / scale).to(FLOAT8), scale


def require_float8(device: torch.device) -> None:
    """Raise ConfigError if the device has no float8 products with a scale for each row."""
    rows, scale = to_float8(torch.ones(16, 16, device=device))
    try:
        torch._scaled_mm(rows, rows.t(), scale, scale.T, out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        got = f"sampling_weights: got float8 on {device}, which has no float8 products ({str(error).splitlines()[0]})"
        raise ConfigError([f"{got}; use a device that has them, or sampling_weights own"]) from error


def merged_weight(layer: nn.Linear | LoraLayer) -> torch.Tensor:
    """Return the float32 weight of a layer, with its adapter if there is one: W + B A alpha / r."""
    if not isinstance(layer, LoraLayer):
        return layer.weight.float()
    weight = layer.base_layer.weight.float()
    for adapter in layer.active_adapters:
        if layer.use_dora.get(adapter) or layer.lora_bias.get(adapter):
            got = "sampling_weights: got float8 with an adapter that has magnitudes (DoRA) or biases"
            raise ConfigError([f"{got}, expected plain LoRA; use sampling_weights own"])
        a, b = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
        weight = torch.addmm(weight, b, a, alpha=layer.scaling[adapter])
    return weight


def _sharing_copy(transformer: nn.Module) -> nn.Module:
    """Return a copy of the modules that shares tensors, block runner and sequence group."""
    shared = chain(transformer.parameters(), transformer.buffers(), transformer.shared_by_copies)
    memo = {id(x): x for x in shared}
    memo |= {id(x): x for x in (transformer.run_block, transformer.sequence_group) if x is not None}
    return copy.deepcopy(transformer, memo)
