"""How a device runs the transformer's blocks: the settings about speed and memory, put to work on a model."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from rlhf.attention import Attention, attention_by, faster_without_gradient, time_kernels, why_not
from rlhf.config import ConfigError
from rlhf.contentv.blocks import BlockRunner
from rlhf.device import has_attention_kernels
from rlhf.exchange import Group
from rlhf.host_memory import HostMemory
from rlhf.quantise import quantise_base
from rlhf.sharding import ShardedRunner, shard_base
from rlhf.streaming import stream_blocks


@dataclass(frozen=True)
class Speed:
    """The settings of these names, see `rlhf.config`. None of them but `base_bits` changes the gradient."""

    gradient_checkpointing: bool = False
    keep_attention: bool = False
    attention_kernel: str = "auto"
    compile_blocks: bool = False
    offload_activations: bool = False
    stream_weights: bool = False
    base_bits: int | None = None
    shard_base: bool = False

    @classmethod
    def of(cls, args: Any) -> "Speed":
        """These settings of any object that has them."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    @property
    def recompute(self) -> str:
        """What the backward pass computes again, as a `BlockRunner` takes it."""
        if not self.gradient_checkpointing:
            return "nothing"
        return "all but attention" if self.keep_attention else "block"


def set_up_blocks(
    transformer: torch.nn.Module, speed: Speed, device: torch.device, sequence_group: Group | None = None
) -> dict[str, Any]:
    """Have a transformer with its adapter run as asked, moved to the device. What was chosen, for the log.

    On a CPU, with nothing asked for, blocks run as diffusers has them. sequence_group: processes that share the tokens.
    """
    chosen, transformer.sequence_group = {}, sequence_group
    if speed.base_bits:
        quantise_base(transformer, device)
    fetch = stream_blocks(transformer, device).fetch if speed.stream_weights else None
    if speed.shard_base:
        shard_base(transformer, device)
    elif fetch is None:
        transformer.to(device)
    plain = speed == Speed(base_bits=speed.base_bits) and sequence_group is None
    if device.type == "cpu" and plain:
        return chosen
    kernel, chosen["attention_kernel"] = choose_kernel(transformer, speed.attention_kernel, device)
    without_gradient = None
    if speed.attention_kernel == "auto" and (found := choose_forward(transformer, kernel, device)):
        without_gradient, line = found
        chosen["attention_kernel"] += f"; {line}"
    runner = BlockRunner(
        attention=attention_by(kernel),
        attention_without_gradient=without_gradient,
        recompute=speed.recompute,
        host=HostMemory(device) if speed.offload_activations else None,
        compiler=torch.compile if speed.compile_blocks else None,
        fetch=fetch,
    )
    transformer.run_block = ShardedRunner(runner) if speed.shard_base else runner
    return chosen


def choose_kernel(transformer: torch.nn.Module, asked: str, device: torch.device) -> tuple[str | None, str]:
    """The kernel's name, None for PyTorch's own choice, and a line about it. "auto" on a CUDA device: the fastest.

    Raises ConfigError for one that does not run there.
    """
    if asked == "default" or (asked == "auto" and not has_attention_kernels(device)):
        return None, "PyTorch's choice"
    if asked != "auto":
        require_kernel(asked, device, transformer.dtype, *_heads(transformer))
        return asked, asked
    seconds = time_kernels(device, transformer.dtype, *_heads(transformer))
    if not seconds:
        return None, "PyTorch's choice"
    times = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
    return next(iter(seconds)), f"{next(iter(seconds))} (forward and backward of 8,192 tokens: {times})"


def require_kernel(kernel: str, device: torch.device, dtype: torch.dtype, heads: int = 2, width: int = 64) -> None:
    """Raise ConfigError where attention by the kernel of that name does not run. width: of a head."""
    if why := why_not(kernel, device, dtype, heads, width):
        name = str(dtype).removeprefix("torch.")
        got = f"attention_kernel: got {kernel} on {device}, which has none for {name} and heads of {width} ({why})"
        raise ConfigError([f"{got}, expected one that the device has; use auto or default"])


def require_compiler(device: torch.device) -> None:
    """Raise ConfigError where torch.compile has no working compiler for the device: some seconds."""
    try:
        torch.compile(torch.sin)(torch.ones(4, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # of whichever backend a device has
        why = " ".join(str(error).split("\n")[:2]).strip()
        got = f"compile_blocks: got true on {device}, where torch.compile fails ({type(error).__name__}: {why})"
        raise ConfigError(
            [f"{got}, expected a compiler that works; install it or use --compile_blocks false"]
        ) from None


def choose_forward(
    transformer: torch.nn.Module, kernel: str | None, device: torch.device
) -> tuple[Attention, str] | None:
    """What is faster than the kernel where no gradient is recorded, on CUDA, and a line about it."""
    if not has_attention_kernels(device):
        return None
    return faster_without_gradient(attention_by(kernel), device, transformer.dtype, *_heads(transformer))


def _heads(transformer) -> tuple[int, int]:
    """Their number and width."""
    return transformer.config.num_attention_heads, transformer.config.attention_head_dim
