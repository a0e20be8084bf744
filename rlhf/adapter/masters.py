"""The fp32 master weights of the trained parameters, as one flat vector."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.tuners.lora import LoraLayer as PeftLayer

from rlhf.adapter.lora_file import INITIAL_KEY, PARTS
from rlhf.adapter.lora_weights import Lora, LoraLayer
from rlhf.config import ConfigError


class MasterWeights:
    """An adapter's fp32 master weights, one flat vector with its gradient; fp64 for fp64 models.

    The modules keep a copy in the base's format for the forward pass. `write` refreshes that copy
    after an optimizer step. `collect_grad` adds the gradients of a backward pass to the vector's,
    so that sums over batches and processes are in fp32.

    Args:
        module: the transformer; its parameters with `requires_grad` are the trained ones.
        average_decay: decay of the running average that `update_averages` keeps; 0 keeps none.
        old_decay: decay of the average that samples videos as the old policy; None keeps none.
        initial: the LoRA that is merged into the module's frozen weights; None for none.
        distilled: whether the adapter is sampled without guidance.

    Raises:
        ValueError: the module has no trainable parameter.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        average_decay: float = 0.0,
        initial: Lora | None = None,
        distilled: bool = False,
        old_decay: float | None = None,
    ):
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not trained:
            raise ValueError("the transformer has no trainable parameter, expected an adapter; pass a peft_config")
        self.names, self.params = (list(column) for column in zip(*trained, strict=True))
        dtypes = [torch.promote_types(p.dtype, torch.float32) for p in self.params]
        flat = [p.detach().flatten().to(dtype) for p, dtype in zip(self.params, dtypes, strict=True)]
        self.vector = torch.cat(flat).requires_grad_(True)
        self.vector.grad = torch.zeros_like(self.vector)
        self.initial, self.distilled, peft = initial or Lora(), distilled, "default"
        layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, PeftLayer)}
        self.alphas = {n: layer.scaling[peft] * layer.r[peft] for n, layer in layers.items() if peft in layer.scaling}
        self.average_decay, self.average = average_decay, self.vector.detach().clone() if average_decay else None
        self.old_decay, self.old = old_decay, None if old_decay is None else self.vector.detach().clone()

    def collect_grad(self) -> int:
        """Add the parameters' gradients to the flat gradient, clear them, return their number."""
        pieces = self._split(self.vector.grad)
        received = [(piece, p) for piece, p in zip(pieces, self.params, strict=True) if p.grad is not None]
        for piece, p in received:
            piece += p.grad
            p.grad = None
        return len(received)

    @torch.no_grad()
    def write(self) -> None:
        """Copy the master weights into the module's parameters, in the dtype of each."""
        for piece, p in zip(self._split(self.vector), self.params, strict=True):
            p.copy_(piece)

    def update_averages(self, update: int) -> None:
        """Update the EMA weights and the old policy's after optimizer step `update`, from 0.

        Those that are None are left out. Each decay rises from 0.1 to its final value, as in
        diffusers' EMAModel.
        """
        for average, decay in ((self.average, self.average_decay), (self.old, self.old_decay)):
            if average is not None:
                average.lerp_(self.vector.detach(), 1 - min(decay, (1 + update) / (10 + update)))

    @contextmanager
    def use(self, weights: torch.Tensor | None) -> Iterator[None]:
        """Use other weights (a flat vector) in the module while inside; None changes nothing."""
        if weights is None:
            yield
            return
        before = self.vector.detach().clone()
        self.set(weights)
        try:
            yield
        finally:
            self.set(before)

    @torch.no_grad()
    def set(self, vector: torch.Tensor) -> None:
        """Replace the master weights and the module's parameters by a flat vector."""
        self.vector.copy_(vector)
        self.write()

    def named(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return views of a flat vector (masters, an optimizer's moment) by parameter name."""
        return dict(zip(self.names, self._split(vector), strict=True))

    def trained_lora(self) -> Lora:
        """Return the trained LoRA on the CPU, without the initial one that it adds to."""
        parts = {name: {} for name in self.alphas}
        for name, tensor in self.named(self.vector).items():
            layer, _, rest = name.partition(".lora_")
            parts[layer][PARTS[f"lora_{rest.partition('.')[0]}"]] = tensor.to("cpu", copy=True)
        layers = {name: LoraLayer(**found, alpha=self.alphas[name]) for name, found in parts.items()}
        return Lora(layers, self.distilled)

    def save_adapter(self, path: Path) -> None:
        """Write one LoRA file for the base: the sum of the initial LoRA and the trained one."""
        self.initial.then(self.trained_lora()).save(path)

    def metadata(self) -> dict[str, str]:
        """Return the metadata of a file of `named`, from which `read_lora` reads the adapter."""
        return self.trained_lora().metadata() | ({INITIAL_KEY: "true"} if self.initial.layers else {})

    @torch.no_grad()
    def load(self, vector: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        """Fill a flat vector from tensors by parameter name, the inverse of `named`.

        Raises ValueError, with the vector unchanged, for other names or shapes than the adapter
        has.
        """
        pieces = self.named(vector)
        got, expected = ({n: tuple(t.shape) for n, t in of.items()} for of in (tensors, pieces))
        if got != expected:
            name = next(n for n in expected | got if got.get(n) != expected.get(n))
            raise ValueError(
                f"{name}: got a tensor of shape {got.get(name)}, expected {expected.get(name)}, as the adapter of this "
                "run has; go on with the adapter that was saved, or start another output_dir"
            )
        for name, piece in pieces.items():
            piece.copy_(tensors[name])

    def require_alphas(self, metadata: dict[str, str]) -> None:
        """Raise ConfigError if a saved adapter, by its file's metadata, has other alphas."""
        saved = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))  # older versions wrote none
        own = self.trained_lora().config()
        for key in ("lora_alpha", "alpha_pattern"):
            expected = saved.get(f"transformer.{key}", own[key])
            if own[key] != expected:
                got = f"peft_config: got {key}={own[key]!r}, expected {expected!r} as the run had"
                raise ConfigError([f"{got}; give that of the run that is resumed"])

    def _split(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """Return views of a flat vector in the shapes of the parameters, detached."""
        pieces = vector.detach().split([p.numel() for p in self.params])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.params, strict=True)]
