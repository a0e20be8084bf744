"""Host memory as a place where tensors wait for the backward pass, copied there and back beside the computation.

host = HostMemory(device)
y = recomputed(function, x, place=host.group())
"""

import weakref
from collections import deque
from contextlib import AbstractContextManager, nullcontext

import torch

SMALLEST_BYTES = 2**20  # smaller tensors stay where they are
AHEAD = 2  # groups whose copies may be under way; more would hold more of the device's memory


class HostMemory:
    """Groups of kept tensors, given back last in, first out: while one is in use, the one before is on its way.

    On an accelerator, buffers are pinned and copies run on a stream of their own. Buffers are used again.
    """

    def __init__(self, device: torch.device, smallest_bytes: int = SMALLEST_BYTES):
        self.device, self.smallest_bytes = torch.device(device), smallest_bytes
        self.stream = None if self.device.type == "cpu" else torch.Stream(device=self.device)
        self.last = _nothing  # a weak reference: a graph that is dropped takes its groups along
        self.free: dict[int, list[torch.Tensor]] = {}
        self.under_way: deque = deque()

    def group(self) -> "Group":
        """A new group, after all those before."""
        self.keep_pace()
        group = Group(self, self.last)
        self.last = weakref.ref(group)
        return group

    def keep_pace(self) -> None:
        """Wait for the copies of some groups ago: what is freed before its copy is done is of no use till then."""
        if self.stream is not None:
            self.under_way.append(self.stream.record_event())
            if len(self.under_way) > AHEAD:
                self.under_way.popleft().synchronize()

    def take(self, size: int) -> torch.Tensor:
        """A buffer of so many bytes."""
        spare = self.free.get(size)
        return spare.pop() if spare else torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None)

    def aside(self) -> AbstractContextManager:
        """Inside, copies run on the other stream, after everything that was asked for before."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.accelerator.current_stream(self.device))
        return self.stream


def _nothing() -> None:
    """A weak reference to a group that is gone."""


class Group:
    """Tensors that come back together, once: `pack` and `unpack` are hooks for autograd's saved tensors."""

    def __init__(self, host: HostMemory, previous):
        self.host, self.previous = host, previous
        self.kept: list[_Kept] = []
        self.arrived = None  # an event of the other stream, once asked back

    def pack(self, tensor: torch.Tensor) -> "torch.Tensor | _Kept":
        """What autograd keeps in place of the tensor: small ones and parameters themselves."""
        size = tensor.numel() * tensor.element_size()
        if size < self.host.smallest_bytes or isinstance(tensor, torch.nn.Parameter):
            return tensor
        with self.host.aside():
            self.kept.append(_Kept(tensor, self.host.take(size)))
        if self.host.stream is not None:
            tensor.record_stream(self.host.stream)
        return self.kept[-1]

    def unpack(self, kept: "torch.Tensor | _Kept") -> torch.Tensor:
        """The tensor on the device; the group before this one is asked back, too."""
        if isinstance(kept, torch.Tensor):
            return kept
        self.ask_back()
        if self.arrived is not None:
            torch.accelerator.current_stream(self.host.device).wait_event(self.arrived)
        if (previous := self.previous()) is not None:
            previous.ask_back()
        return kept.give(self.host)

    def ask_back(self) -> None:
        """Start the copies to the device, unless they have been started."""
        if any(kept.tensor is None and kept.buffer is not None for kept in self.kept):
            self.host.keep_pace()
            for kept in self.kept:
                kept.tensor = torch.empty_like(kept.form, device=self.host.device)
            with self.host.aside():
                for kept in self.kept:
                    kept.tensor.copy_(kept.on_host(), non_blocking=True)
            if self.host.stream is not None:
                self.arrived = self.host.stream.record_event()
                for kept in self.kept:
                    kept.tensor.record_stream(self.host.stream)


class _Kept:
    """One tensor: in host memory until it is given back."""

    def __init__(self, tensor: torch.Tensor, buffer: torch.Tensor):
        self.form = torch.empty_like(tensor, device="meta")  # shape, dtype and order in memory
        self.buffer, self.tensor = buffer, None
        self.on_host().copy_(tensor, non_blocking=True)

    def on_host(self) -> torch.Tensor:
        return self.buffer.view(self.form.dtype).as_strided(self.form.shape, self.form.stride())

    def give(self, host: HostMemory) -> torch.Tensor:
        """The tensor on the device. The buffer is free: what it takes next, the same stream copies after this."""
        if self.buffer is None:
            raise RuntimeError("a second backward pass through tensors kept in host memory; they come back only once")
        host.free.setdefault(self.buffer.numel(), []).append(self.buffer)
        tensor, self.tensor, self.buffer = self.tensor, None, None
        return tensor
