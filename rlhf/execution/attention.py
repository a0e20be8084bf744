"""Attention kernels: PyTorch's by name, FlashAttention-3, and the fastest of them by benchmark.

Shape legend: B batch, N tokens, H heads, W width of a head.
"""

import importlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlhf.device import time_call

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # query, key, value (B, H, N, W)

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Modules with FlashAttention-3 (arXiv 2407.08608) for NVIDIA's Hopper: Dao-AILab's package, then
# `fa3-fwd`, which has the forward pass alone.
FLASH_ATTENTION_3 = ("flash_attn_interface", "fa3_fwd_interface")
REPEATS = 3  # timed calls of a kernel, of which the fastest counts


def attention_function(kernel: str | None) -> Attention:
    """Return F.scaled_dot_product_attention restricted to one of `KERNELS`; None: unrestricted."""
    if kernel is None:
        return F.scaled_dot_product_attention

    def attention(query, key, value):
        with sdpa_kernel(KERNELS[kernel]):
            return F.scaled_dot_product_attention(query, key, value)

    return attention


def kernel_error(kernel: str, device: torch.device, dtype: torch.dtype, heads: int, width: int) -> str | None:
    """Return PyTorch's error if a kernel cannot run forward and backward, else None."""
    try:
        _forward_backward(attention_function(kernel), _random_qkv(device, dtype, heads, width, 64, requires_grad=True))
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def load_flash_attention_3() -> Attention | None:
    """Return FlashAttention-3, for use without gradient; None if no package provides it."""
    for package in FLASH_ATTENTION_3:
        try:
            return _with_heads_first(importlib.import_module(package).flash_attn_func)
        except (ImportError, OSError):  # not installed, or built for another CUDA
            continue
    return None


def _with_heads_first(attention_BNHW: Callable) -> Attention:
    """Return an attention over (B, H, N, W) that calls one over (B, N, H, W)."""

    def attention(query, key, value):
        result = attention_BNHW(*(x.transpose(1, 2) for x in (query, key, value)))
        result = result[0] if isinstance(result, tuple) else result  # some releases add the log-sum-exp
        return result.transpose(1, 2)

    return attention


def time_kernels(
    device: torch.device, dtype: torch.dtype, heads: int, width: int, tokens: int = 8192
) -> dict[str, float]:
    """Return seconds of forward and backward by kernel name, the fastest first.

    Kernels that do not work on the device are left out. width: of a head.
    """
    qkv = _random_qkv(device, dtype, heads, width, tokens, requires_grad=True)
    attentions = {name: attention_function(name) for name in KERNELS}
    return _benchmark(attentions, lambda attention: _forward_backward(attention, qkv), device)


def faster_inference_attention(
    attention: Attention, device: torch.device, dtype: torch.dtype, heads: int, width: int, tokens: int = 8192
) -> tuple[Attention, str] | None:
    """Return FlashAttention-3 and a log line if it works and is faster than `attention`."""
    if (flash := load_flash_attention_3()) is None:
        return None
    qkv = _random_qkv(device, dtype, heads, width, tokens)
    seconds = _benchmark({"flash": flash, "given": attention}, lambda attend: attend(*qkv), device)
    if next(iter(seconds), "given") == "given":
        return None
    times = " instead of ".join(f"{1e3 * value:.1f} ms" for value in seconds.values())
    return flash, f"FlashAttention-3 in no-grad steps, {times}"


def _random_qkv(device, dtype, heads: int, width: int, tokens: int, requires_grad: bool = False) -> list[torch.Tensor]:
    """Return query, key and value (1, H, N, W) with the strides that a block's have."""
    shape = (1, tokens, heads, width)
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=requires_grad).transpose(1, 2) for _ in "qkv"]


def _forward_backward(attention: Attention, qkv: list[torch.Tensor]) -> None:
    """Run an attention and its backward pass."""
    attention(*qkv).sum().backward()


def _benchmark(
    attentions: dict[str, Attention], work: Callable[[Attention], object], device: torch.device
) -> dict[str, float]:
    """Return seconds of work(attention) by name, the fastest first, without those that raise."""
    seconds = {}
    for name, attention in attentions.items():
        try:
            times = [time_call(partial(work, attention), device) for _ in range(1 + REPEATS)]
            seconds[name] = min(times[1:])  # the first call loads and plans
        except RuntimeError:  # "no available kernel"; some kernels raise it for a shape or a chip
            continue
    return dict(sorted(seconds.items(), key=lambda item: item[1]))
