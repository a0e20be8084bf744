"""Which kernel computes attention: of those that PyTorch has for this device, the fastest at the shape in question."""

import importlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlhf.device import seconds_of

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (B, heads, N, width) three times

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# FlashAttention-3 (arXiv 2407.08608) for NVIDIA's Hopper: Dao-AILab's own package; its forward pass alone, `fa3-fwd`.
FLASH_ATTENTION_3 = ("flash_attn_interface", "fa3_fwd_interface")
REPEATS = 3


def attention_by(kernel: str | None) -> Attention:
    """`F.scaled_dot_product_attention` by the kernel of that name; by PyTorch's own choice for None."""
    if kernel is None:
        return F.scaled_dot_product_attention

    def attention(query, key, value):
        with sdpa_kernel(KERNELS[kernel]):
            return F.scaled_dot_product_attention(query, key, value)

    return attention


def why_not(kernel: str, device: torch.device, dtype: torch.dtype, heads: int, width: int) -> str | None:
    """What PyTorch says where the kernel of that name does not run, forward and backward; None where it does."""
    try:
        attention_by(kernel)(*_inputs(device, dtype, heads, width, 64, requires_grad=True)).sum().backward()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def flash_attention_3() -> Attention | None:
    """FlashAttention-3, to be used without gradient; None where no package has it."""
    for package in FLASH_ATTENTION_3:
        try:
            return _of_heads(importlib.import_module(package).flash_attn_func)
        except (ImportError, OSError):  # not installed, or built for another CUDA
            continue
    return None


def _of_heads(of_tokens: Callable) -> Attention:
    """Attention as PyTorch's, from one over (B, N, heads, width); some releases return more than the result."""

    def attention(query, key, value):
        found = of_tokens(*(x.transpose(1, 2) for x in (query, key, value)))
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return attention


def time_kernels(
    device: torch.device, dtype: torch.dtype, heads: int, width: int, tokens: int = 8192
) -> dict[str, float]:
    """Seconds of forward and backward by name of kernel, the fastest first, of those that work on this device.

    width: of a head. Attention over 8,192 tokens is large enough to show the order, and takes milliseconds.
    """
    inputs = _inputs(device, dtype, heads, width, tokens, requires_grad=True)

    def there_and_back(attention):
        attention(*inputs).sum().backward()

    return _fastest_first({name: attention_by(name) for name in KERNELS}, there_and_back, device)


def faster_without_gradient(
    attention: Attention, device: torch.device, dtype: torch.dtype, heads: int, width: int, tokens: int = 8192
) -> tuple[Attention, str] | None:
    """FlashAttention-3 and a line about it, where it is installed, works here and is faster than `attention`."""
    if (other := flash_attention_3()) is None:
        return None
    inputs = _inputs(device, dtype, heads, width, tokens)
    ways = {"FlashAttention-3": other, "else": attention}
    seconds = _fastest_first(ways, lambda way: way(*inputs), device)
    if next(iter(seconds), "else") == "else":
        return None
    times = " instead of ".join(f"{1e3 * value:.1f} ms" for value in seconds.values())
    return other, f"FlashAttention-3 without gradient, {times}"


def _inputs(device, dtype, heads: int, width: int, tokens: int, requires_grad: bool = False) -> list[torch.Tensor]:
    """Query, key and value as a block has them, heads innermost but for their width."""
    shape = (1, tokens, heads, width)
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=requires_grad).transpose(1, 2) for _ in "qkv"]


def _fastest_first(ways: dict[str, Attention], work: Callable[[Attention], None], device) -> dict[str, float]:
    """Seconds that work(way) takes, of those ways that do not raise."""
    seconds = {}
    for name, way in ways.items():
        try:
            times = [seconds_of(partial(work, way), device) for _ in range(1 + REPEATS)]
            seconds[name] = min(times[1:])  # the first call loads and plans
        except RuntimeError:  # "no available kernel"; also what some raise for a shape or a chip they do not know
            continue
    return dict(sorted(seconds.items(), key=lambda item: item[1]))
