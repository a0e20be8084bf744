"""What a device does in a second: of devices that the benchmark ran on, and a measurement for any other.

Few numbers, each from one small computation; `rlhf.time_plan` makes the time of a whole step of them.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from rlhf.attention import attention_by, time_kernels
from rlhf.device import describe, memory_beside, seconds_of
from rlhf.measured import RATES
from rlhf.parts import small_transformer, trace_transformer
from rlhf.trace import Operation, dtype_name

ROUNDS, ROUND_SECONDS = 3, 0.05  # of a measurement: many calls in a row, at the clock that a device can hold
# Rows, inner and outer size of a product; channels, frames, height, width of a convolution; heads, tokens, width of a
# head; bytes that are copied: of the sizes of ContentV-8B at work, and on a CPU of those of nano.
LARGE = ((8192, 2432, 9728), (192, 4, 216, 384), (38, 8192, 64), 2**28)
WIDTH = 2432  # of ContentV-8B's blocks
SMALL = ((2048, 160, 640), (32, 8, 64, 64), (4, 512, 40), 2**24)


@dataclass(frozen=True)
class Rates:
    """flops: FLOP/s by kind of `rlhf.trace.Operation` and format, such as "matrix bfloat16"."""

    device: str
    flops: dict[str, float]
    bytes: float  # read and written in a second where a block's activations are scaled
    call_seconds: float  # of one small operator, called from Python
    autograd_seconds: float  # and from autograd's engine
    link: float | None  # bytes a second between host and device; None where they are one
    beside: int = 0  # bytes of the device that a process takes besides what PyTorch has asked for
    waits: bool = False  # computation and calls take turns, as on a CPU; otherwise they overlap
    between: float | None = None  # bytes a second from one device to another of this machine; None: not measured

    @property
    def to_others(self) -> float:
        """Bytes a second to another process's device; where that was not measured, those to the host."""
        return self.between or self.link or self.bytes

    def to_dict(self) -> dict:
        """As a dict, for JSON."""
        return asdict(self)

    def seconds(self, operation: Operation) -> float:
        """Seconds of an operation: of its computation or of its memory traffic, whichever takes longer."""
        moving = operation.bytes / (self.to_others if operation.kind == "exchange" else self.bytes)
        if not operation.flops:
            return moving
        return max(operation.flops / self.speed(operation.kind, operation.dtype), moving)

    def speed(self, kind: str, dtype: str) -> float:
        """FLOP/s of a kind in a format; where not measured, of that kind in float32, else of float32 products."""
        return self.flops.get(f"{kind} {dtype}") or self.flops.get(f"{kind} float32") or self.flops["matrix float32"]


def known_rates(name: str) -> Rates | None:
    """The rates of a device that bench/planner.py ran on, by its own name; None of any other."""
    return Rates(device=name, **RATES[name]) if name in RATES else None


def device_rates(device: torch.device) -> tuple[Rates, str]:
    """The rates of this machine's device, measured if they are not known, and where they are from."""
    if known := known_rates(describe(device)):
        return known, "measured by bench/planner.py"
    return measure_rates(device), "measured now, in a few small computations"


def measure_rates(device: torch.device) -> Rates:
    """The rates of this machine's device, measured now, in some seconds."""
    sizes = SMALL if device.type == "cpu" else LARGE
    flops = {}
    for dtype in (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16):
        flops |= _products(device, dtype, sizes[0]) | _convolutions(device, dtype, sizes[1])
        flops |= _attention(device, dtype, sizes[2])
    return Rates(
        describe(device),
        flops,
        _traffic(device, sizes[3]),
        *_calls(device),
        _link(device, sizes[3]),
        memory_beside(device),
        device.type == "cpu",
        _between(device, sizes[3]),
    )


def _products(device, dtype, size) -> dict[str, float]:
    M, K, N = size
    x, y = torch.randn(M, K, device=device, dtype=dtype), torch.randn(K, N, device=device, dtype=dtype)
    return {f"matrix {dtype_name(dtype)}": 2 * M * K * N / _least(lambda: x @ y, device)}


def _convolutions(device, dtype, size) -> dict[str, float]:
    """Of 3x3x3, as in the decoder: forward, and back to the input."""
    channels, *space = size
    x = torch.randn(1, channels, *space, device=device, dtype=dtype)
    weight = torch.randn(channels, channels, 3, 3, 3, device=device, dtype=dtype)
    flops = 2 * 27 * channels * x.numel()
    forward = _least(lambda: F.conv3d(x, weight, padding=1), device)
    backward = _least(lambda: torch.nn.grad.conv3d_input(x.shape, weight, x, padding=1), device)
    return {f"conv {dtype_name(dtype)}": flops / forward, f"conv backward {dtype_name(dtype)}": flops / backward}


def _attention(device, dtype, size) -> dict[str, float]:
    """By the fastest kernel; the backward pass is what is left of both."""
    H, N, W = size
    kernels = {} if device.type == "cpu" else time_kernels(device, dtype, H, W, N)
    attention = attention_by(next(iter(kernels), None))
    query, key, value = (torch.randn(1, H, N, W, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn_like(query)
    with torch.no_grad():
        forward = _least(lambda: attention(query, key, value), device)
    both = _least(lambda: attention(query, key, value).backward(gradient), device)
    products = 2 * H * N * N * W
    back = max(both - forward, forward)
    return {
        f"attention {dtype_name(dtype)}": 2 * products / forward,
        f"attention backward {dtype_name(dtype)}": 5 * products / back,
    }


def _traffic(device, size: int) -> float:
    """Bytes a second of what blocks do most besides products: a factor for each channel, which is not the fastest."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x = torch.ones(size // (WIDTH * dtype.itemsize), WIDTH, device=device, dtype=dtype)
    scale = torch.ones(WIDTH, device=device, dtype=dtype)
    return 2 * x.nbytes / _least(lambda: x * scale, device)


def _calls(device) -> tuple[float, float]:
    """Seconds of an operator of a transformer that is too small to matter, from Python and from autograd's engine."""
    traced = trace_transformer(small_transformer("meta"), (1, 16, 1, 4, 4), 4)
    model, run = small_transformer(device), {}
    inputs = (torch.zeros(1, 16, 1, 4, 4, device=device), torch.zeros(1, 4, 32, device=device))
    inputs += (torch.zeros(1, 32, device=device), torch.zeros(1, device=device))

    def forward():
        run["v"] = model(*inputs, return_dict=False)[0]

    def back():
        run["v"].backward(torch.ones_like(run["v"]))

    def there_and_back():
        forward()
        return seconds_of(back, device)

    with torch.no_grad():
        no_graph = _least(forward, device)
    backward = min(there_and_back() for _ in range(1 + ROUNDS))
    return no_graph / traced.sampling.calls, backward / max(1, traced.backward.calls_of_autograd)


def _link(device, size: int) -> float | None:
    if device.type == "cpu":
        return None
    on_host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    return size / _least(lambda: there.copy_(on_host, non_blocking=True), device)


def _between(device, size: int) -> float | None:
    """From the neighbour to this device; of copies one way, as exchanges have them both ways."""
    if device.type == "cpu" or torch.accelerator.device_count() < 2:
        return None
    neighbour = torch.device(device.type, ((device.index or 0) + 1) % torch.accelerator.device_count())
    x, y = (torch.empty(size, dtype=torch.uint8, device=where) for where in (neighbour, device))
    return size / _least(lambda: y.copy_(x, non_blocking=True), device)


def _least(work: Callable, device: torch.device) -> float:
    """Seconds of a call among many in a row: what another program adds is none of the device's."""
    work()  # loads and plans
    times = max(1, round(ROUND_SECONDS / seconds_of(work, device)))

    def round_of_them():
        for _ in range(times):
            work()

    return min(seconds_of(round_of_them, device) for _ in range(ROUNDS)) / times
