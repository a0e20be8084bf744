"""A second transformer for no-grad steps: float8 products, adapter merged into the weights.

It shares all other weights with the trained transformer, whose base stays as it was loaded. Not
exact: float8 keeps three bits of the mantissa.
"""

import copy
from itertools import chain

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import linear

from rlhf.config import ConfigError

FLOAT8 = torch.float8_e4m3fn


class SamplingCopy:
    """A float8 copy of a transformer, to sample from without gradient.

    Call `refresh` after each optimizer step. The blocks' attention and feed-forward layers multiply
    in float8, with a scale for each token and each output. Adapted layers of other shapes than
    float8 takes are merged in the base's format.

    Args:
        transformer: with the adapter, on its device; frozen but for the adapter.

    Raises:
        ConfigError: the device has no float8 products.
        ValueError: the adapter is no plain LoRA.
    """

    def __init__(self, transformer: nn.Module):
        require_float8(transformer.device)
        self.model = _sharing_copy(transformer)
        self.layers: list[tuple[nn.Module, nn.Linear | LoraLayer]] = []  # copied layer, source of its weight
        sources = dict(transformer.named_modules())
        for name, module in list(self.model.named_modules()):
            if isinstance(module, LoraLayer):
                self._replace(name, sources[name])
        for name, module in list(self.model.transformer_blocks.named_modules(prefix="transformer_blocks")):
            modulation = ".norm" in name  # of one row: nothing to gain
            if isinstance(module, nn.Linear) and _fits(module) and not modulation:
                self._replace(name, sources[name])
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Merge the adapter's current weights into the copy."""
        for layer, source in self.layers:
            layer.set_weight(merged_weight(source))

    def _replace(self, name: str, source: nn.Module) -> None:
        base = source.base_layer if isinstance(source, LoraLayer) else source
        layer, (parent, _, child) = (Float8Linear if _fits(base) else MergedLinear)(base), name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, layer)
        self.layers.append((layer, source))


class MergedLinear(nn.Module):
    """A linear layer with its own weight and a shared bias."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.bias = base.bias
        self.register_buffer("weight", torch.empty_like(base.weight))

    def set_weight(self, weight: torch.Tensor) -> None:
        """Store a float32 weight in the base's format."""
        self.weight.copy_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b."""
        return linear(x, self.weight, self.bias)


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


def merged_weight(layer: nn.Module) -> torch.Tensor:
    """Return the float32 weight of a layer, with its adapter if there is one: W + B A alpha / r."""
    if not isinstance(layer, LoraLayer):
        return layer.weight.float()
    weight = layer.base_layer.weight.float()
    for adapter in layer.active_adapters:
        if layer.use_dora.get(adapter):
            raise ValueError("a sampling copy of a DoRA adapter, expected plain LoRA; set lora_use_dora to false")
        if layer.lora_bias.get(adapter):
            raise ValueError("a sampling copy of an adapter with biases, expected plain LoRA; set lora_bias to false")
        a, b = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
        weight = torch.addmm(weight, b, a, alpha=layer.scaling[adapter])
    return weight


def _fits(layer: nn.Linear) -> bool:
    return layer.in_features % 16 == 0 and layer.out_features % 16 == 0


def _sharing_copy(transformer):
    """Return a copy of the modules that shares tensors, block runner and sequence group."""
    shared = chain(transformer.parameters(), transformer.buffers(), [transformer.pos_embed._tables])
    memo = {id(x): x for x in shared}
    memo |= {id(x): x for x in (transformer.run_block, transformer.sequence_group) if x is not None}
    return copy.deepcopy(transformer, memo)
