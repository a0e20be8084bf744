"""The weights of a LoRA by layer: merged, scaled, added, saved by keys of diffusers or ComfyUI."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from rlhf.io import save_tensors

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
DISTILLED_KEY = "guidance_distilled"  # metadata: sampled without guidance


@dataclass(frozen=True)
class LoraLayer:
    """A linear layer's LoRA: W + alpha / r B A, whose rows DoRA gives the lengths `magnitude`."""

    a: torch.Tensor  # (r, in), float32 or float64
    b: torch.Tensor  # (out, r)
    alpha: float
    magnitude: torch.Tensor | None = None  # (out,)

    @property
    def scale(self) -> float:
        """Return alpha / r."""
        return self.alpha / len(self.a)

    def merge(self, weight: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """Return the merged weight (out, in), float32 or float64, with `factor` times the LoRA.

        DoRA's row lengths are interpolated between those of the weight and the trained ones.
        """
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        added = torch.addmm(weight, self.b.to(weight), self.a.to(weight), alpha=factor * self.scale)
        if self.magnitude is None:
            return added
        return added * (self.scaled_magnitude(weight, factor) / added.norm(dim=1))[:, None]

    def scaled_magnitude(self, weight: torch.Tensor, factor: float) -> torch.Tensor:
        """Return DoRA's row lengths for `factor` times the LoRA."""
        return weight.norm(dim=1).lerp(self.magnitude.to(weight), factor)


@dataclass(frozen=True)
class Lora:
    """A LoRA. distilled: it is sampled without guidance. remark: what its file left open."""

    layers: dict[str, LoraLayer] = field(default_factory=dict)
    distilled: bool = False
    remark: str = ""

    @property
    def has_magnitudes(self) -> bool:
        """Return whether it is a DoRA."""
        return any(layer.magnitude is not None for layer in self.layers.values())

    @property
    def identity(self) -> str:
        """Return a digest of the matrices A, which no scale changes."""
        found = hashlib.sha256()
        for name, layer in sorted(self.layers.items()):
            found.update(name.encode() + layer.a.float().cpu().numpy().tobytes())
        return found.hexdigest()[:16]

    def then(self, other: "Lora") -> "Lora":
        """Return the sum with a LoRA that was trained on top of this one: ranks add, exactly."""
        layers = self.layers | other.layers
        for name in self.layers.keys() & other.layers.keys():
            first, second = self.layers[name], other.layers[name]
            b = torch.cat([first.b * (first.scale / second.scale), second.b.to(first.b)], 1)
            a = torch.cat([first.a, second.a.to(first.a)])
            layers[name] = LoraLayer(a, b, second.scale * len(a))
        return replace(other, layers=layers)

    def scaled(self, factor: float, fold: bool = False) -> "Lora":
        """Return it with B multiplied by `factor`, and with `fold` by alpha / r, too.

        Raises ValueError if a product is not finite.
        """
        layers = {}
        for name, layer in self.layers.items():
            b = layer.b * (factor * (layer.scale if fold else 1))
            if not b.isfinite().all():
                got = f"{name}: got B times {factor:g}{f' and {layer.scale:g}' if fold else ''}, which is not finite"
                raise ValueError(f"{got}, expected a number of float32; choose a smaller scale")
            layers[name] = replace(layer, b=b, alpha=len(layer.a) if fold else layer.alpha)
        return replace(self, layers=layers)

    def config(self) -> dict[str, Any]:
        """Return the arguments of peft's LoraConfig."""
        ranks = {name: len(layer.a) for name, layer in self.layers.items()}
        alphas = {name: _whole(layer.alpha) for name, layer in self.layers.items()}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        return {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted(self.layers),
            "use_dora": self.has_magnitudes,
            "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
            "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by diffusers' keys: "transformer.", layer, ".lora_A.weight" or B."""
        named = {}
        for name, layer in self.layers.items():
            named |= {f"transformer.{name}.lora_A.weight": layer.a, f"transformer.{name}.lora_B.weight": layer.b}
            if layer.magnitude is not None:
                named[f"transformer.{name}.lora_magnitude_vector"] = layer.magnitude
        return named

    def metadata(self) -> dict[str, str]:
        """Return the metadata of a LoRA file: peft's config with the keys that diffusers reads."""
        config = {f"transformer.{key}": value for key, value in self.config().items()}
        told = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}
        return told | ({DISTILLED_KEY: "true"} if self.distilled else {})

    def save(self, path: Path) -> None:
        """Write the file, which `read_lora` and diffusers' load_lora_weights read."""
        save_tensors(path, self.tensors(), self.metadata())

    def save_original(self, path: Path, original_name: Callable[[str], str]) -> None:
        """Write a file with the layers' names in the authors' code, as ComfyUI reads it.

        It has no alpha: the scale has to be in B.
        """
        assert all(layer.scale == 1 for layer in self.layers.values())
        parts = {name: {"lora_A": layer.a, "lora_B": layer.b} for name, layer in self.layers.items()}
        named = {
            f"diffusion_model.{original_name(name)}.{part}.weight": tensor
            for name, tensors in parts.items()
            for part, tensor in tensors.items()
        }
        save_tensors(path, named, {"format": "pt"} | ({DISTILLED_KEY: "true"} if self.distilled else {}))


def _whole(value: float) -> float | int:
    """Return the value as an int if it is whole."""
    return int(value) if float(value).is_integer() else value
