"""Apply a LoRA to a transformer, merged into its weights or as an adapter of peft."""

import math
from dataclasses import replace
from statistics import median

import torch

from rlhf.adapter.lora_weights import Lora


def check_lora_scale(scale: float) -> None:
    """Raise ValueError for a scale that is not finite in float32."""
    if not abs(scale) <= torch.finfo(torch.float32).max:
        raise ValueError(f"scale: got {scale}, expected a finite number, such as 1 or 0.5; correct it")


@torch.no_grad()
def apply_lora(transformer: torch.nn.Module, lora: Lora, scale: float = 1.0, merge: bool = False) -> str:
    """Apply `scale` times the LoRA, and return a line on how many layers it changes, and how far.

    Args:
        transformer: the model that the LoRA was read for, without an adapter.
        lora: the LoRA, by `rlhf.adapter.lora_file.read_lora`.
        scale: 0 is the base, 1 the LoRA. DoRA's row lengths are interpolated likewise.
        merge: add it to the weights, in float32 and rounded once to their dtype. Else the
            transformer gets an adapter of peft.

    Raises:
        ValueError: the sum of weight and LoRA is not finite.
    """
    changes, layers, count = {}, {}, sum(isinstance(module, torch.nn.Linear) for module in transformer.modules())
    for name, layer in lora.layers.items():
        weight = transformer.get_submodule(name).weight
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        merged = layer.merge(weight, scale)
        change, norm = (merged - wide).norm().item(), wide.norm().item()
        changes[name] = change / (norm or 1.0)
        if not math.isfinite(change):
            got = f"{name}: got a product of LoRA weights and scale {scale:g} that is not finite"
            raise ValueError(f"{got}, expected one; lower the scale, or take another LoRA")
        if merge:
            weight.copy_(merged)
        magnitude = None if layer.magnitude is None else layer.scaled_magnitude(wide, scale)
        layers[name] = replace(layer, alpha=layer.alpha * scale, magnitude=magnitude)
    if not merge and layers:
        scaled = replace(lora, layers=layers)
        metadata = {f"transformer.{key}": value for key, value in scaled.config().items()}
        transformer.load_lora_adapter(scaled.tensors(), prefix="transformer", metadata=metadata)
    return _effect_line(count, changes, lora.remark)


def _effect_line(count: int, changes: dict[str, float], remark: str) -> str:
    """Return the line of `apply_lora`. changes: relative change of each layer's weight."""
    changed = {name: change for name, change in changes.items() if change}
    line = f"LoRA: {len(changed)} of {count} linear layers changed"
    if changed:
        largest = max(changed, key=changed.get)
        line += f", by {median(changed.values()):.2%} of the weight's norm in the median"
        line += f" and {changed[largest]:.2%} at most ({largest})"
    return f"{line}; {remark}" if remark else line
