"""How often an adapter counts: in a model, and in LoRA files whose scale needs no reader that knows it.

What a layer adds is lora_alpha / r times B A. diffusers keeps lora_alpha in the file's metadata; ComfyUI reads tensors
`NAME.alpha`, which diffusers refuses, and takes the scale as 1 where there is none (its comfy/lora.py and
comfy/weight_adapter/lora.py). Multiplied into B, the scale is the same for both. The names of the layers are the same
anyway: ComfyUI maps `transformer.` and the names that diffusers gives the parts of Stable Diffusion 3's transformer.
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
    """Raise ValueError for one that is no number."""
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number, such as 1 or 0.5; correct it")


@contextmanager
def scaled(transformer: torch.nn.Module, scale: float) -> Iterator[None]:
    """Inside, the adapter counts `scale` times, 0 for the base; afterwards once again.

    What is learnt of a weight is B A, and with DoRA how far its magnitudes are from the norms that they began as.
    """
    magnitudes = list(_magnitudes(transformer)) if scale != 1 else []
    learnt = [parameter.detach().clone() for parameter, _ in magnitudes]
    scale_lora_layers(transformer, scale)
    for parameter, norms in magnitudes:
        parameter.data.copy_(norms.to(parameter).lerp(parameter.detach(), scale))
    try:
        yield
    finally:
        unscale_lora_layers(transformer, scale)
        for (parameter, _), before in zip(magnitudes, learnt, strict=True):
            parameter.data.copy_(before)


def _magnitudes(transformer: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """DoRA's magnitudes, and the norms of the base's weights, layer by layer; nothing for plain LoRA."""
    for layer in (module for module in transformer.modules() if isinstance(module, BaseTunerLayer)):
        for dora in getattr(layer, "lora_magnitude_vector", {}).values():
            weight = layer.get_base_layer().weight.detach().to(dora.weight.dtype)
            yield dora.weight, dora.get_weight_norm(weight, 0.0, scaling=0.0)


def fold_scale(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and metadata of an adapter, with lora_alpha / r of each layer multiplied into B.

    Raises ValueError for DoRA, which ComfyUI keeps by other names.
    """
    config = json.loads(metadata[LORA_ADAPTER_METADATA_KEY])
    if config.get(f"{PREFIX}use_dora"):
        raise ValueError("got an adapter with magnitudes (lora_use_dora), expected plain LoRA; use --merged")
    folded = {}
    for key, value in tensors.items():
        layer, _, kind = key.partition(".lora_")
        rank = tensors[f"{layer}.lora_A.weight"].shape[0]
        folded[key] = (
            value * (_alpha(layer.removeprefix(PREFIX), config) / _divisor(rank, config)) if kind[0] == "B" else value
        )
    config |= {f"{PREFIX}lora_alpha": config[f"{PREFIX}r"], f"{PREFIX}use_rslora": False}
    config[f"{PREFIX}alpha_pattern"] = config.get(f"{PREFIX}rank_pattern") or {}
    return folded, metadata | {LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}


def _alpha(layer: str, config: dict) -> float:
    pattern = config.get(f"{PREFIX}alpha_pattern") or {}
    return pattern.get(get_pattern_key(pattern, layer), config[f"{PREFIX}lora_alpha"])


def _divisor(rank: int, config: dict) -> float:
    return rank**0.5 if config.get(f"{PREFIX}use_rslora") else rank
