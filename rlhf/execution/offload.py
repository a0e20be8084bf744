"""Activation offloading: saved tensors wait in host memory for the backward pass.

Copies to the host and back overlap with the computation.

host = HostMemory(device)
y = gradient_checkpoint(function, x, offload=host.group())
"""

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

SMALLEST_BYTES = 2**20  # smaller tensors stay on the device
MAX_IN_FLIGHT = 2  # groups that are copied at a time; more would hold more of the device's memory
ALIGNMENT = 256  # bytes, as of a separate allocation
SMALLEST_SLAB, LARGE_SLAB, LARGEST_SLAB = 2**24, 2**28, 2**31  # bytes


class HostBuffers:
    """Buffers that are cut out of a few large allocations of host memory, and live as long.

    PyTorch rounds each pinned allocation up to a power of two: of its own, a buffer of 406 MiB
    would take 512.

    Args:
        pin_memory: for copies that an accelerator makes on its own.
        expected: bytes of all buffers, if that is known.
    """

    def __init__(self, pin_memory: bool, expected: int = 0):
        self.pin_memory, self.left, self.slabs = pin_memory, expected, []
        self.used: list[int] = []  # of each slab, in bytes

    def take(self, size: int) -> torch.Tensor:
        """Return a new buffer of `size` bytes."""
        room = -(-size // ALIGNMENT) * ALIGNMENT
        fits = (i for i, slab in enumerate(self.slabs) if self.used[i] + room <= slab.numel())
        if (i := next(fits, None)) is None:
            slab = max(self._wanted(), 1 << (room - 1).bit_length())
            self.slabs.append(torch.empty(slab, dtype=torch.uint8, pin_memory=self.pin_memory))
            self.used.append(0)
            i = len(self.slabs) - 1
        start, self.used[i], self.left = self.used[i], self.used[i] + room, self.left - room
        return self.slabs[i][start : start + size]

    def _wanted(self) -> int:
        """Return the bytes of the next slab, a power of two.

        They are the expected bytes that are left, or else as many as are in use, so that slabs
        double.
        """
        known = min(self.left, LARGEST_SLAB)
        wanted = known if known > 0 else min(max(sum(self.used), SMALLEST_SLAB), LARGE_SLAB)
        return 1 << (wanted.bit_length() - 1)


def host_bytes(sizes: list[int], expected: bool = False) -> int:
    """Return the bytes that `HostBuffers` allocates for buffers of these sizes.

    expected: their sum is announced first, so slabs are made to fit.
    """
    buffers = HostBuffers(False, sum(sizes) * expected)
    with torch.device("meta"):
        for size in sizes:
            buffers.take(size)
    return sum(slab.numel() for slab in buffers.slabs)


@contextmanager
def visit_device(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Have a module be on a device while inside. It then has its old weights again, not copies."""
    tensors = [*module.parameters(), *module.buffers()]
    homes = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(device)
    try:
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home


class HostMemory:
    """A stack of tensor groups in host memory.

    While one group is used, the one before is prefetched. On an accelerator, buffers are pinned and
    copies run on a separate stream. Buffers are reused.

    Args:
        smallest_bytes: smaller tensors stay on the device.
    """

    def __init__(self, device: torch.device, smallest_bytes: int = SMALLEST_BYTES):
        self.device, self.smallest_bytes = torch.device(device), smallest_bytes
        self.stream = None if self.device.type == "cpu" else torch.Stream(device=self.device)
        self.last = lambda: None  # later a weak reference: a graph that is dropped frees its groups
        self.buffers = HostBuffers(pin_memory=self.stream is not None)
        self.free: dict[int, list[torch.Tensor]] = {}  # buffers by size
        self.in_flight: deque = deque()  # events, one for each group that is being copied

    def group(self) -> "OffloadGroup":
        """Return a new group on top of the stack; wait first if too many are being copied."""
        self.throttle()
        group = OffloadGroup(self, self.last)
        self.last = weakref.ref(group)
        return group

    def throttle(self) -> None:
        """Wait until at most `MAX_IN_FLIGHT` groups are being copied.

        The device's memory of a tensor is only free when its copy is done.
        """
        if self.stream is not None:
            self.in_flight.append(self.stream.record_event())
            if len(self.in_flight) > MAX_IN_FLIGHT:
                self.in_flight.popleft().synchronize()

    def take(self, size: int) -> torch.Tensor:
        """Return a buffer of `size` bytes."""
        spare = self.free.get(size)
        return spare.pop() if spare else self.buffers.take(size)

    def copy_stream(self) -> AbstractContextManager:
        """Return a context in which copies run on the separate stream, after all queued work."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.accelerator.current_stream(self.device))
        return self.stream


class OffloadGroup:
    """Tensors that are offloaded and come back together, once.

    `pack` and `unpack` are hooks of `torch.autograd.graph.saved_tensors_hooks`.
    """

    def __init__(self, host: HostMemory, previous):
        self.host, self.previous = host, previous
        self.kept: list[_Offloaded] = []
        self.arrived = None  # an event of the copy stream, once prefetched

    def pack(self, tensor: torch.Tensor) -> "torch.Tensor | _Offloaded":
        """Offload a tensor; return small ones and parameters as they are."""
        size = tensor.numel() * tensor.element_size()
        if size < self.host.smallest_bytes or isinstance(tensor, torch.nn.Parameter):
            return tensor
        with self.host.copy_stream():
            self.kept.append(_Offloaded(tensor, self.host.take(size)))
        if self.host.stream is not None:
            tensor.record_stream(self.host.stream)
        return self.kept[-1]

    def unpack(self, kept: "torch.Tensor | _Offloaded") -> torch.Tensor:
        """Return the tensor on the device, and prefetch the group before this one."""
        if isinstance(kept, torch.Tensor):
            return kept
        self.prefetch()
        if self.arrived is not None:
            torch.accelerator.current_stream(self.host.device).wait_event(self.arrived)
        if (previous := self.previous()) is not None:
            previous.prefetch()
        return kept.restore(self.host)

    def prefetch(self) -> None:
        """Start the copies to the device, unless they have been started."""
        if any(kept.tensor is None and kept.buffer is not None for kept in self.kept):
            self.host.throttle()
            for kept in self.kept:
                kept.tensor = torch.empty_like(kept.form, device=self.host.device)
            with self.host.copy_stream():
                for kept in self.kept:
                    kept.tensor.copy_(kept.on_host(), non_blocking=True)
            if self.host.stream is not None:
                self.arrived = self.host.stream.record_event()
                for kept in self.kept:
                    kept.tensor.record_stream(self.host.stream)


class _Offloaded:
    """One tensor in host memory, until `restore` returns it."""

    def __init__(self, tensor: torch.Tensor, buffer: torch.Tensor):
        self.form = torch.empty_like(tensor, device="meta")  # shape, dtype and strides
        self.buffer, self.tensor = buffer, None
        self.on_host().copy_(tensor, non_blocking=True)

    def on_host(self) -> torch.Tensor:
        """Return the buffer as a tensor with the original shape, strides and dtype."""
        return self.buffer.view(self.form.dtype).as_strided(self.form.shape, self.form.stride())

    def restore(self, host: HostMemory) -> torch.Tensor:
        """Return the tensor on the device and free the buffer.

        The next tensor in the buffer is copied by the same stream, so after this one.
        """
        if self.buffer is None:
            raise RuntimeError(
                "a second backward pass through offloaded tensors, which come back only once; run forward again"
            )
        host.free.setdefault(self.buffer.numel(), []).append(self.buffer)
        tensor, self.tensor, self.buffer = self.tensor, None, None
        return tensor
