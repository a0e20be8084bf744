"""Which kernel computes attention: of those that PyTorch has for this device, the fastest at the shape in question."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlhf.device import synchronize

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (B, heads, N, width) three times

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
REPEATS = 3


def attention_by(kernel: str | None) -> Attention:
    """`F.scaled_dot_product_attention` by the kernel of that name; by PyTorch's own choice for None."""
    if kernel is None:
        return F.scaled_dot_product_attention

    def attention(query, key, value):
        with sdpa_kernel(KERNELS[kernel]):
            return F.scaled_dot_product_attention(query, key, value)

    return attention


def time_kernels(
    device: torch.device, dtype: torch.dtype, heads: int, width: int, tokens: int = 8192
) -> dict[str, float]:
    """Seconds of forward and backward by name of kernel, the fastest first, of those that work on this device.

    width: of a head. Attention over 8,192 tokens is large enough to show the order, and takes milliseconds.
    """
    shape = (1, heads, tokens, width)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    seconds = {}
    for kernel in KERNELS:
        try:
            seconds[kernel] = _seconds(attention_by(kernel), query, key, value)
        except RuntimeError:  # "no available kernel"; also what some raise for a shape or a chip they do not know
            continue
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def _seconds(attention: Attention, *inputs: torch.Tensor) -> float:
    times = []
    for _ in range(1 + REPEATS):  # the first call loads and plans
        synchronize(inputs[0].device)
        began = time.perf_counter()
        attention(*inputs).sum().backward()
        synchronize(inputs[0].device)
        times.append(time.perf_counter() - began)
    return min(times[1:])
