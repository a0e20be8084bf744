"""The trained part of the transformer: LoRA by peft, whole blocks beside it, their float32 masters, their files."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from rlhf.config import RewardGradientConfig

# The projections of SD3's joint attention: of the video's tokens, and of the text's.
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
BLOCKS_FILE = "trained_blocks.safetensors"


def lora_config(args: RewardGradientConfig) -> LoraConfig:
    """LoRA as the settings describe it, outside of the blocks that are trained whole."""
    whole = "|".join(re.escape(block) for block in args.train_blocks or [])
    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_rank if args.lora_alpha is None else args.lora_alpha,
        target_modules=args.lora_target_modules or ATTENTION,
        use_dora=args.lora_use_dora,
        rank_pattern=args.lora_rank_pattern or {},
        alpha_pattern=args.lora_alpha_pattern or {},
        exclude_modules=rf"({whole})(\..*)?" if whole else None,
    )


def settings_of(config: PeftConfig | None) -> dict:
    """The settings that describe a LoRA, as far as they can; {} for None and for other adapters."""
    if not isinstance(config, LoraConfig):
        return {}
    layers = config.target_modules
    named = {"lora_target_modules": sorted(layers)} if isinstance(layers, list | set) else {}
    return named | {
        "lora_rank": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_use_dora": config.use_dora,
        "lora_rank_pattern": config.rank_pattern or None,
        "lora_alpha_pattern": config.alpha_pattern or None,
    }


def add_adapter(
    transformer: torch.nn.Module, config: PeftConfig, seed: int, train_blocks: list[str] | None = None
) -> None:
    """Freeze the transformer and add the adapter named "default"; it and the train_blocks are all that is trained.

    A is drawn from `seed` on the CPU, the same on every device and process; B is zero, so nothing changes yet.
    train_blocks: names of modules, such as transformer_blocks.3, whose own weights are trained. ValueError for none.
    """
    transformer.requires_grad_(False).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(copy.deepcopy(config))  # peft writes the layers that it finds into it
    for block in train_blocks or []:
        try:
            transformer.get_submodule(block).requires_grad_(True)
        except AttributeError:
            names = ", ".join(name for name, _ in transformer.named_children())
            raise ValueError(f"train_blocks: got {block!r}, expected modules of {names}; correct the name") from None


class Masters:
    """The trained numbers in float32, as one flat vector with its gradient, whatever the base computes in.

    The modules keep a copy in the dtype of the base for the forward pass: `write` refreshes it after an optimizer step,
    `collect_grad` brings a backward pass's gradients here, so that sums over batches and processes are in float32.

    average_decay: of the running average of the vector that `update_average` keeps; 0 keeps none.
    """

    def __init__(self, module: torch.nn.Module, average_decay: float = 0.0):
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not trained:
            raise ValueError("the transformer has no trainable parameter, expected an adapter; pass a peft_config")
        self.names, self.params = (list(column) for column in zip(*trained, strict=True))
        # Of whole blocks; an adapter's parameters carry its name.
        self.base_weights = {name: p.detach().clone() for name, p in trained if "default" not in name.split(".")}
        self.vector = torch.cat([p.detach().flatten().to(_master_dtype(p)) for p in self.params])
        self.vector.requires_grad_(True).grad = torch.zeros_like(self.vector)
        self.average_decay, self.average = average_decay, self.vector.detach().clone() if average_decay else None

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

    def update_average(self, update: int) -> None:
        """Move the average towards the vector after optimizer step `update`, from 0: faster at first, as diffusers'."""
        if self.average is not None:
            decay = min(self.average_decay, (1 + update) / (10 + update))
            self.average.lerp_(self.vector.detach(), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, vector and module hold the average, if there is one."""
        if self.average is None:
            yield
            return
        kept = self.vector.detach().clone()
        self.set(self.average)
        try:
            yield
        finally:
            self.set(kept)

    @torch.no_grad()
    def set(self, vector: torch.Tensor) -> None:
        """Fill the vector and the module's parameters."""
        self.vector.copy_(vector)
        self.write()

    def named(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat vector (the masters, an optimizer's moment) as tensors by parameter name, views of it."""
        return dict(zip(self.names, self._split(vector), strict=True))

    @torch.no_grad()
    def load(self, vector: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        """Fill a flat vector from tensors by parameter name: the inverse of `named`. ValueError for other ones."""
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

    def _split(self, vector: torch.Tensor) -> list[torch.Tensor]:
        pieces = vector.detach().split([p.numel() for p in self.params])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.params, strict=True)]


@contextmanager
def adapter_off(transformer: torch.nn.Module, masters: Masters) -> Iterator[None]:
    """Inside, the transformer is the base model."""
    whole = {name: p for name, p in zip(masters.names, masters.params, strict=True) if name in masters.base_weights}
    tuned = {name: p.detach().clone() for name, p in whole.items()}
    transformer.disable_adapters()
    _copy(whole, masters.base_weights)
    try:
        yield
    finally:
        _copy(whole, tuned)
        transformer.enable_adapters()


def without_adapter(function: Callable, transformer: torch.nn.Module, masters: Masters) -> Callable:
    """The function, called with the transformer as the base model."""

    def of_base(*args):
        with adapter_off(transformer, masters):
            return function(*args)

    return of_base


@torch.no_grad()
def _copy(parameters: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _master_dtype(parameter: torch.Tensor) -> torch.dtype:
    """float32, or float64 for a float64 model (gradient proofs)."""
    return torch.promote_types(parameter.dtype, torch.float32)


def save_adapter(pipe: DiffusionPipeline, masters: Masters, folder: Path) -> None:
    """Write folder/pytorch_lora_weights.safetensors, float32, in the layout that `pipe.load_lora_weights` reads.

    Blocks that were trained whole go beside it, into trained_blocks.safetensors, by the transformer's own names.
    """
    transformer, trained = pipe.transformer, {n: t.cpu() for n, t in masters.named(masters.vector).items()}
    layers = get_peft_model_state_dict(transformer, state_dict=dict(transformer.state_dict()) | trained)
    config = {
        k: sorted(v) if isinstance(v, set) else v for k, v in transformer.peft_config["default"].to_dict().items()
    }
    type(pipe).save_lora_weights(
        folder,
        transformer_lora_layers={name: tensor.contiguous() for name, tensor in layers.items()},
        transformer_lora_adapter_metadata=config,
    )
    if masters.base_weights:
        save_file({name: trained[name].contiguous() for name in masters.base_weights}, folder / BLOCKS_FILE)
