"""The adapters: LoRA on the transformer by peft, their float32 masters, their file."""

from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import get_peft_model_state_dict

# The projections of SD3's joint attention: of the video's tokens, and of the text's.
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def lora_config(rank: int, alpha: int | None, target_modules: list[str] | None) -> LoraConfig:
    """LoRA as the settings describe it; alpha None is the rank, target_modules None the attention projections."""
    return LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=target_modules or ATTENTION)


def add_adapter(transformer, config: PeftConfig, seed: int) -> None:
    """Freeze the transformer and add the adapter named "default", the only part of it that is trained.

    A is drawn from `seed` on the CPU, the same on every device and process; B is zero, so nothing changes yet.
    """
    transformer.requires_grad_(False).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config)


@contextmanager
def adapter_off(transformer):
    """Inside, the transformer is the base model."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


class Masters:
    """The trained numbers in float32, as one flat vector with its gradient, whatever the base computes in.

    The modules keep a copy in the dtype of the base for the forward pass: `write` refreshes it after an optimizer step,
    `collect_grad` brings a backward pass's gradients here, so that sums over batches and processes are in float32.
    """

    def __init__(self, module: torch.nn.Module):
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not trained:
            raise ValueError("the transformer has no trainable parameter, expected an adapter; pass a peft_config")
        self.names, self.params = (list(column) for column in zip(*trained, strict=True))
        self.vector = torch.cat([p.detach().flatten().to(_master_dtype(p)) for p in self.params])
        self.vector.requires_grad_(True).grad = torch.zeros_like(self.vector)

    def collect_grad(self) -> int:
        """Add the parameters' gradients to the vector's and clear them. How many parameters had one."""
        pieces = self._split(self.vector.grad)
        received = [(piece, p) for piece, p in zip(pieces, self.params, strict=True) if p.grad is not None]
        for piece, p in received:
            piece += p.grad
            p.grad = None
        return len(received)

    @torch.no_grad()
    def write(self) -> None:
        """Copy the vector into the module's parameters."""
        for piece, p in zip(self._split(self.vector), self.params, strict=True):
            p.copy_(piece)

    def named(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat vector (the masters, an optimizer's moment) as tensors by parameter name, views of it."""
        return dict(zip(self.names, self._split(vector), strict=True))

    @torch.no_grad()
    def load(self, vector: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        """Fill a flat vector from tensors by parameter name: the inverse of `named`."""
        for name, piece in self.named(vector).items():
            piece.copy_(tensors[name])

    def _split(self, vector: torch.Tensor) -> list[torch.Tensor]:
        pieces = vector.detach().split([p.numel() for p in self.params])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.params, strict=True)]


def _master_dtype(parameter: torch.Tensor) -> torch.dtype:
    """float32, or float64 for a float64 model (gradient proofs)."""
    return torch.promote_types(parameter.dtype, torch.float32)


def save_adapter(pipe, masters: Masters, folder: Path) -> None:
    """Write folder/pytorch_lora_weights.safetensors, float32, in the layout that `pipe.load_lora_weights` reads."""
    transformer = pipe.transformer
    state = dict(transformer.state_dict()) | {n: t.cpu() for n, t in masters.named(masters.vector).items()}
    layers = get_peft_model_state_dict(transformer, state_dict=state)
    config = {
        k: sorted(v) if isinstance(v, set) else v for k, v in transformer.peft_config["default"].to_dict().items()
    }
    type(pipe).save_lora_weights(
        folder,
        transformer_lora_layers={name: tensor.contiguous() for name, tensor in layers.items()},
        transformer_lora_adapter_metadata=config,
    )
