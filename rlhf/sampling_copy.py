"""A second transformer for sampling alone, with the adapter merged into the weights, if asked in 8-bit floats.

It shares all weights with the first, whose base stays as it was loaded, but for the layers that are merged or rounded.
Not exact: merged weights are rounded to the base's format, and 8-bit products to three bits of mantissa.
"""

import copy
from itertools import chain

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import linear

from rlhf.config import ConfigError

FLOAT8 = torch.float8_e4m3fn
FORMATS = ("merged", "float8")


class SamplingCopy:
    """`model`, to be sampled from without gradient; `refresh()` after each optimizer step.

    Args:
        transformer: with the adapter, on its device; frozen but for the adapter.
        weights: "merged", in the format of the transformer; or "float8": the blocks' attention and feed-forward layers
            multiply in float8, with a scale for each token and each output. The device must have such products.
    """

    def __init__(self, transformer: nn.Module, weights: str = "merged"):
        if weights not in FORMATS:
            raise ValueError(f"weights={weights!r}, expected {' or '.join(FORMATS)}; choose one of these")
        if weights == "float8":
            require_float8(transformer.device)
        self.model = _sharing_copy(transformer)
        self.layers: list[tuple[nn.Module, nn.Linear | LoraLayer]] = []  # ours, and where its weight comes from
        sources = dict(transformer.named_modules())
        for name, module in list(self.model.named_modules()):
            if isinstance(module, LoraLayer):
                self._replace(name, sources[name], weights)
        for name, module in list(self.model.transformer_blocks.named_modules(prefix="transformer_blocks")):
            modulation = ".norm" in name  # of one row: nothing to gain
            if weights == "float8" and isinstance(module, nn.Linear) and _fits(module) and not modulation:
                self._replace(name, sources[name], weights)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Merge the adapter as it is now."""
        for layer, source in self.layers:
            layer.set_weight(merged_weight(source))

    def _replace(self, name: str, source: nn.Module, weights: str) -> None:
        base = source.base_layer if isinstance(source, LoraLayer) else source
        kind = Float8Linear if weights == "float8" and _fits(base) else MergedLinear
        layer, (parent, _, child) = kind(base), name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, layer)
        self.layers.append((layer, source))


class MergedLinear(nn.Module):
    """A linear layer with a weight of its own and another's bias."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.bias = base.bias
        self.register_buffer("weight", torch.empty_like(base.weight))

    def set_weight(self, weight: torch.Tensor) -> None:
        """Take a float32 weight, rounded to the own format."""
        self.weight.copy_(weight)

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Float8Linear(nn.Module):
    """x W^T + b, both factors rounded to float8 with one scale a row."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.bias = base.bias
        self.register_buffer("weight", torch.empty_like(base.weight, dtype=FLOAT8))
        self.register_buffer("scale", torch.empty(1, base.out_features, device=base.weight.device))

    def set_weight(self, weight: torch.Tensor) -> None:
        """Take a float32 weight, rounded to float8 with a scale for each output."""
        rounded, scale = to_float8(weight)
        self.weight.copy_(rounded)
        self.scale.copy_(scale.T)

    def forward(self, x):
        rows, scale = to_float8(x.flatten(0, -2))
        y = torch._scaled_mm(rows, self.weight.t(), scale, self.scale, out_dtype=x.dtype)
        y = y.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def to_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (R, K) in float8 and its scales (R, 1), float32: x is about their product."""
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / torch.finfo(FLOAT8).max
    return (x / scale).to(FLOAT8), scale


def require_float8(device: torch.device) -> None:
    """Raise ConfigError where the device has no products of rows scaled in float8."""
    rows, scale = to_float8(torch.ones(16, 16, device=device))
    try:
        torch._scaled_mm(rows, rows.t(), scale, scale.T, out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        got = f"sampling_weights: got float8 on {device}, which has no float8 products ({str(error).splitlines()[0]})"
        raise ConfigError([f"{got}; use a device that has, or sampling_weights merged"]) from error


def merged_weight(layer: nn.Module) -> torch.Tensor:
    """W + B A alpha / r of an adapted layer, W of another, in float32."""
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
    """A copy of the modules, not of the tensors, nor of what runs its blocks."""
    shared = chain(transformer.parameters(), transformer.buffers(), [transformer.pos_embed._tables])
    memo = {id(x): x for x in shared}
    memo |= {id(x): x for x in (transformer.run_block, transformer.sequence_group) if x is not None}
    return copy.deepcopy(transformer, memo)
