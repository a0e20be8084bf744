"""The scale of an adapter: in a model, and folded into the weights of a LoRA file.

A LoRA layer adds B A times lora_alpha / r. diffusers reads lora_alpha from the file's metadata.
ComfyUI reads it from tensors `NAME.alpha`, which diffusers refuses, and takes the scale as 1
without them (its comfy/lora.py and comfy/weight_adapter/lora.py). With the scale multiplied into B,
both agree. Layer names need no change: ComfyUI knows `transformer.` and diffusers' names for Stable
Diffusion 3.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key

PREFIX = "transformer."


def check_scale(scale: float) -> None:
    """Raise ValueError for a scale that is not finite."""
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number, such as 1 or 0.5; correct it")


@contextmanager
def scaled(transformer: torch.nn.Module, scale: float) -> Iterator[None]:
    """Scale the adapter by `scale` while inside; 0 is the base, 1 changes nothing.

    With DoRA, magnitudes are interpolated between the base weights' norms and the trained values.
    """
    magnitudes = list(_magnitudes(transformer)) if scale != 1 else []
    trained = [parameter.detach().clone() for parameter, _ in magnitudes]
    scale_lora_layers(transformer, scale)
    for parameter, norms in magnitudes:
        parameter.data.copy_(norms.to(parameter).lerp(parameter.detach(), scale))
    try:
        yield
    finally:
        unscale_lora_layers(transformer, scale)
        for (parameter, _), before in zip(magnitudes, trained, strict=True):
            parameter.data.copy_(before)


def _magnitudes(transformer: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Yield DoRA's magnitudes and the base weights' norms by layer; nothing for plain LoRA."""
    for layer in (module for module in transformer.modules() if isinstance(module, BaseTunerLayer)):
        for dora in getattr(layer, "lora_magnitude_vector", {}).values():
            weight = layer.get_base_layer().weight.detach().to(dora.weight.dtype)
            yield dora.weight, dora.get_weight_norm(weight, 0.0, scaling=0.0)


def fold_scale(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return an adapter's tensors and metadata with each layer's lora_alpha / r multiplied into B.

    Raises ValueError for DoRA, whose tensors ComfyUI names differently.
    """
    config = json.loads(metadata[LORA_ADAPTER_METADATA_KEY])
    if config.get(f"{PREFIX}use_dora"):
        raise ValueError("got an adapter with magnitudes (lora_use_dora), expected plain LoRA; use --merged")
    alphas = config.get(f"{PREFIX}alpha_pattern") or {}
    folded = dict(tensors)
    for key in (key for key in tensors if ".lora_B" in key):
        layer = key.partition(".lora_")[0]
        rank = tensors[f"{layer}.lora_A.weight"].shape[0]
        alpha = alphas.get(get_pattern_key(alphas, layer.removeprefix(PREFIX)), config[f"{PREFIX}lora_alpha"])
        folded[key] = tensors[key] * (alpha / (rank**0.5 if config.get(f"{PREFIX}use_rslora") else rank))
    config |= {f"{PREFIX}lora_alpha": config[f"{PREFIX}r"], f"{PREFIX}use_rslora": False}
    config[f"{PREFIX}alpha_pattern"] = config.get(f"{PREFIX}rank_pattern") or {}
    return folded, metadata | {LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}
