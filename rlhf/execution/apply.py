"""Apply the options about speed and memory to a transformer and its blocks."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from rlhf.device import has_attention_kernels
from rlhf.execution.attention import (
    Attention,
    attention_function,
    faster_inference_attention,
    kernel_error,
    time_kernels,
)
from rlhf.execution.blocks import BlockRunner
from rlhf.execution.collectives import Group
from rlhf.execution.fsdp import ShardedRunner, shard_base
from rlhf.execution.offload import HostMemory
from rlhf.execution.quantize import quantize_base
from rlhf.execution.weight_streaming import stream_blocks


class UnsupportedOptionError(ValueError):
    """An option that the device cannot run: the option and its value, the reason, and the cure."""


@dataclass(frozen=True)
class ExecutionOptions:
    """Options of running the transformer's blocks. Only `base_bits` changes the gradient."""

    gradient_checkpointing: bool = False  # recompute blocks in the backward pass
    keep_attention: bool = False  # except for their attention
    attention_kernel: str = "auto"  # a name of `rlhf.execution.attention.KERNELS`, "auto" or "default"
    compile_blocks: bool = False
    offload_activations: bool = False  # of recomputed blocks
    stream_weights: bool = False  # of recomputed blocks
    base_bits: int | None = None  # a weight of the frozen base; None: not quantized
    shard_base: bool = False

    @classmethod
    def from_settings(cls, settings: Any) -> "ExecutionOptions":
        """Return the options of any object with attributes of these names."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    @property
    def recompute(self) -> str:
        """Return the part that the backward pass recomputes, one of `BlockRunner`'s choices."""
        if not self.gradient_checkpointing:
            return "nothing"
        return "all but attention" if self.keep_attention else "block"


def set_up_blocks(
    transformer: torch.nn.Module,
    options: ExecutionOptions,
    device: torch.device,
    sequence_group: Group | None = None,
) -> dict[str, Any]:
    """Move a transformer with its adapter to the device and have its blocks run by the options.

    With the default options on a CPU, blocks run as in diffusers. Returns the choices that were
    made, by the option's name, for the log. Raises UnsupportedOptionError if the attention kernel
    does not run on the device.

    sequence_group: ranks that share the tokens of one video.
    """
    chosen, transformer.sequence_group = {}, sequence_group
    if options.base_bits:
        quantize_base(transformer, device)
    fetch = stream_blocks(transformer, device).fetch if options.stream_weights else None
    if options.shard_base:
        shard_base(transformer, device)
    elif fetch is None:
        transformer.to(device)
    is_default = options == ExecutionOptions(base_bits=options.base_bits) and sequence_group is None
    if device.type == "cpu" and is_default:
        return chosen
    kernel, chosen["attention_kernel"] = choose_kernel(transformer, options.attention_kernel, device)
    inference_attention = None
    if options.attention_kernel == "auto" and (faster := choose_inference_kernel(transformer, kernel, device)):
        inference_attention, line = faster
        chosen["attention_kernel"] += f"; {line}"
    runner = BlockRunner(
        attention=attention_function(kernel),
        inference_attention=inference_attention,
        recompute=options.recompute,
        host=HostMemory(device) if options.offload_activations else None,
        compiler=torch.compile if options.compile_blocks else None,
        fetch=fetch,
        parts=transformer.block_parts,
    )
    transformer.run_block = ShardedRunner(runner) if options.shard_base else runner
    return chosen


def choose_kernel(transformer: torch.nn.Module, option: str, device: torch.device) -> tuple[str | None, str]:
    """Return the name of the attention kernel, None for PyTorch's choice, and a log line.

    "auto" benchmarks the kernels where there are several. Raises UnsupportedOptionError if the
    named kernel does not run on the device.
    """
    if option == "default" or (option == "auto" and not has_attention_kernels(device)):
        return None, "PyTorch's choice"
    if option != "auto":
        require_kernel(option, device, transformer.dtype, *_heads(transformer))
        return option, option
    seconds = time_kernels(device, transformer.dtype, *_heads(transformer))
    if not seconds:
        return None, "PyTorch's choice"
    times = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
    return next(iter(seconds)), f"{next(iter(seconds))} (forward and backward of 8,192 tokens: {times})"


def choose_inference_kernel(
    transformer: torch.nn.Module, kernel: str | None, device: torch.device
) -> tuple[Attention, str] | None:
    """Return a faster attention for no-grad steps and a log line; None if there is none."""
    if not has_attention_kernels(device):
        return None
    return faster_inference_attention(attention_function(kernel), device, transformer.dtype, *_heads(transformer))


def require_kernel(kernel: str, device: torch.device, dtype: torch.dtype, heads: int = 2, width: int = 64) -> None:
    """Raise UnsupportedOptionError unless the kernel runs, backward too. width: of a head."""
    if error := kernel_error(kernel, device, dtype, heads, width):
        name = str(dtype).removeprefix("torch.")
        got = f"attention_kernel: got {kernel} on {device}, which has none for {name} and heads of {width} ({error})"
        raise UnsupportedOptionError(f"{got}, expected one that the device has; use auto or default")


def require_compiler(device: torch.device) -> None:
    """Raise UnsupportedOptionError if torch.compile fails on the device. Takes some seconds."""
    try:
        torch.compile(torch.sin)(torch.ones(4, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # every backend has its own types
        why = " ".join(str(error).split("\n")[:2]).strip()
        got = f"compile_blocks: got true on {device}, where torch.compile fails ({type(error).__name__}: {why})"
        cure = "install it or use --compile_blocks false"
        raise UnsupportedOptionError(f"{got}, expected a compiler that works; {cure}") from None


def _heads(transformer: torch.nn.Module) -> tuple[int, int]:
    """Return the number of heads and the width of a head."""
    return transformer.config.num_attention_heads, transformer.config.attention_head_dim
