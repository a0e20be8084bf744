"""Count memory, FLOPs and bytes moved of code that runs on tensors without storage.

Tensors on PyTorch's "meta" device have shapes and lifetimes, but no numbers. On such tensors
the training functions run in about a second. A `Trace` counts what the same functions would need on
an accelerator at full size.

Shape legend: B batch, H heads, N tokens, W width of a head.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from diffusers.models.normalization import RMSNorm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from rlhf.execution.offload import HostMemory

CONVOLUTIONS = ("convolution", "convolution_backward")
ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
# Passes over the data in a ring: an all-reduce is a reduce-scatter followed by an all-gather.
RING_PASSES = {"allreduce_": 2, "_allgather_base_": 1, "alltoall_base_": 1}


@dataclass(frozen=True)
class Operation:
    """One kind of operator call: "matrix", "conv", "attention", "collective" or "other"."""

    kind: str
    dtype: str  # such as "bfloat16"
    flops: int
    bytes: int  # read and written; sent, for a collective


@dataclass
class Phase:
    """The device memory and the work of one stretch of code. Bytes leave out parameters."""

    bytes_before: int
    bytes_after: int = 0
    peak_bytes: int = 0
    work: Counter[Operation] = field(default_factory=Counter)
    offloaded: Counter[int] = field(default_factory=Counter)  # tensors in host memory, by bytes

    @property
    def launches(self) -> int:
        """The number of operator calls."""
        return self.work.total()

    @property
    def added_bytes(self) -> int:
        """Peak bytes above the bytes held before."""
        return self.peak_bytes - self.bytes_before


class Trace(TorchDispatchMode):
    """A count of everything that runs inside, by phase.

    modules: their parameters and buffers are left out of the bytes.

    with Trace(module) as trace:
        with trace.phase() as forward:
            y = module(x)
        with trace.phase() as backward:
            y.backward(...)
    """

    def __init__(self, *modules: nn.Module):
        super().__init__()
        weights = (t for module in modules for t in (*module.parameters(), *module.buffers()))
        self.ignored = {_storage_id(t) for t in weights}
        self.live: dict[int, int] = {}  # bytes by storage
        self.live_bytes, self.phases = 0, []

    def ignore(self, tensor: torch.Tensor) -> None:
        """Leave a tensor out of the bytes."""
        self.ignored.add(_storage_id(tensor))

    @contextmanager
    def phase(self) -> Iterator[Phase]:
        """Count what runs inside the block in a new phase and in all enclosing phases."""
        phase = Phase(self.live_bytes, peak_bytes=self.live_bytes)
        self.phases.append(phase)
        try:
            yield phase
        finally:
            phase.bytes_after = self.live_bytes
            self.phases.remove(phase)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, operation = _call(func, args, kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._track(x)
        self.count(operation)
        return out

    def count(self, operation: Operation) -> None:
        """Count one operator call."""
        for phase in self.phases:
            phase.work[operation] += 1
            phase.peak_bytes = max(phase.peak_bytes, self.live_bytes)

    def offload(self, size: int) -> None:
        """Count a tensor of `size` bytes that moves to host memory."""
        for phase in self.phases:
            phase.offloaded[size] += 1

    def _track(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage, key = tensor.untyped_storage(), _storage_id(tensor)
        if tensor.device.type != "meta" or key in self.ignored or key in self.live:
            return
        self.live[key] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        """Subtract a freed storage from the live bytes."""
        self.live_bytes -= self.live.pop(key)


def _call(func, args: tuple, kwargs: dict) -> tuple[object, Operation]:
    """Call an operator. Return its result and what it costs.

    PyTorch's shape functions are slow Python. The result's shapes are therefore cached by operator
    and arguments. Views are not cached.
    """
    key = None if func.namespace == "c10d" else (func, _cache_key(args), _cache_key(kwargs))
    if key in _KNOWN:
        make, operation = _KNOWN[key]
        return make(args), operation
    out = func(*args, **kwargs)
    outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    operation = _operation(func, args, kwargs, out, inputs, outputs)
    if key and args and out is args[0] and _cache_key(out) == key[1][0]:  # in place
        _KNOWN[key] = (lambda args: args[0]), operation
    elif key and {*map(_storage_id, outputs)}.isdisjoint(map(_storage_id, inputs)):
        template = tree_map_only(torch.Tensor, _allocate_like, out)
        if list(map(_cache_key, tree_leaves(template))) == list(map(_cache_key, tree_leaves(out))):
            _KNOWN[key] = (lambda args: tree_map_only(torch.Tensor, _allocate_like, template)), operation
    return out, operation


_KNOWN: dict[tuple, tuple[Callable, Operation]] = {}  # by operator and arguments


def _cache_key(x: object) -> object:
    """Return a hashable that is equal for arguments of equal shapes and values."""
    if isinstance(x, torch.Tensor):
        return x.shape, x.stride(), x.storage_offset(), x.dtype, x.device, x.untyped_storage().nbytes()
    if isinstance(x, (tuple, list)):
        return tuple(map(_cache_key, x))
    if isinstance(x, dict):
        return tuple((name, _cache_key(value)) for name, value in x.items())
    return type(x), x


def _allocate_like(x: torch.Tensor) -> torch.Tensor:
    """Return an empty "meta" tensor with the shape, strides and dtype of x."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _storage_id(tensor: torch.Tensor) -> int:
    """Return an id of a tensor's storage, which is unique while the storage exists."""
    return tensor.untyped_storage()._cdata


def _dtype_name(dtype: torch.dtype) -> str:
    """Return the name without "torch."."""
    return str(dtype).removeprefix("torch.")


def _operation(func, args, kwargs, out, inputs, outputs) -> Operation:
    """Return an operator call's kind, dtype, FLOPs and moved bytes."""
    name = func.overloadpacket.__name__
    if func.namespace == "c10d":
        return Operation("collective", _dtype_name(inputs[0].dtype), 0, _sent_bytes(name, inputs))
    dtype = _dtype_name(outputs[0].dtype if outputs else torch.float32)
    if func.overloadpacket in flop_registry:
        flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        kind = "conv" if name in CONVOLUTIONS else "matrix"
        return Operation(kind, dtype, flops, _bytes(inputs + outputs))
    moved = 0 if _moves_nothing(func, name, inputs, outputs) else _bytes(inputs + outputs)
    return Operation("other", dtype, 0, moved)


def _sent_bytes(name: str, tensors: list[torch.Tensor]) -> int:
    """Return the bytes that each rank sends. tensors: the collective's; the first is its result."""
    size = dist.get_world_size()
    return RING_PASSES[name] * _bytes(tensors[:1]) * (size - 1) // size


@contextmanager
def fake_process_group(size: int) -> Iterator[dist.ProcessGroup | None]:
    """Open a process group as rank 0 of `size` that sends nothing. None for one rank."""
    if size == 1:
        yield None
        return
    dist.init_process_group("fake", rank=0, world_size=size)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _moves_nothing(func, name: str, inputs, outputs) -> bool:
    """Return whether an operator makes a view or allocates memory without writing to it."""
    shares_storage = {*map(_storage_id, inputs)} & {*map(_storage_id, outputs)}
    return name in ALLOCATIONS or bool(shares_storage and not func._schema.is_mutable)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of all elements."""
    return sum(x.numel() * x.element_size() for x in tensors)


# ----------------------------------------- fused kernels and offloading, as an accelerator has them


def fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Stand in for attention inside a trace. query is (B, H, N, W); key and value (B, H, M, W)."""
    return _Attention.apply(query, key, value)


class _Attention(torch.autograd.Function):
    """Fused attention, which keeps its inputs, the result and one log-sum-exp a row."""

    @staticmethod
    def forward(ctx, query, key, value):
        """Return an empty result; count the two products, and save what a fused kernel saves."""
        result = torch.empty_like(query)
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, log_sum_exp)
        _count_attention(query, key, products=2)
        return result

    @staticmethod
    def backward(ctx, grad):
        """Count attention's backward pass and return empty gradients."""
        query, key, value, *_ = ctx.saved_tensors
        query_gradient = query.new_empty(query.shape, dtype=torch.float32)  # accumulated over blocks of keys
        _count_attention(query, key, products=5)
        gradients = tuple(torch.empty_like(x) for x in (query, key, value))
        del query_gradient
        return gradients


def _count_attention(query_BHNW: torch.Tensor, key_BHMW: torch.Tensor, products: int) -> None:
    """Count attention. products: matrix products of N x M x W for each head."""
    flops = 2 * products * query_BHNW.numel() * key_BHMW.shape[-2]
    _get_current_dispatch_mode().count(Operation("attention", _dtype_name(query_BHNW.dtype), flops, 0))


class _FusedNorm(nn.Module):
    """An RMS norm as one kernel. On "meta" PyTorch would take the norm apart."""

    def forward(self, hidden_states):
        """Return the result of `_RmsNorm`."""
        return _RmsNorm.apply(hidden_states)


class _RmsNorm(torch.autograd.Function):
    """A stand-in for a fused RMS norm, with the same saved tensors and the same bytes moved."""

    @staticmethod
    def forward(ctx, x):
        """Return a tensor like x; save what the kernel saves."""
        ctx.save_for_backward(x, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.neg(x)

    @staticmethod
    def backward(ctx, grad):
        """Return a tensor like x; it moves as many bytes as the kernel."""
        (x, _) = ctx.saved_tensors
        return torch.add(x, grad)


def use_fused_norms(transformer: nn.Module) -> None:
    """Change the norms of queries and keys in place, so that each counts as one kernel."""
    for module in transformer.modules():
        if isinstance(module, nn.RMSNorm | RMSNorm):
            module.__class__ = _FusedNorm


class MetaOffload(HostMemory):
    """A `HostMemory` for "meta" tensors: offloaded tensors are not live."""

    def __init__(self, smallest_bytes: int = 2**20):
        super().__init__("cpu", smallest_bytes)

    def group(self) -> "_MetaGroup":
        """Return a new group, which follows all earlier groups."""
        group = _MetaGroup(self.smallest_bytes, self.last)
        self.last = weakref.ref(group)
        return group


class _MetaGroup:
    """The counterpart of `rlhf.execution.offload.Group`."""

    def __init__(self, smallest_bytes: int, previous):
        self.smallest_bytes, self.previous, self.offloaded = smallest_bytes, previous, []

    def pack(self, tensor):
        """Record a large tensor as offloaded; return small ones and parameters as they are."""
        if _bytes([tensor]) < self.smallest_bytes or isinstance(tensor, nn.Parameter):
            return tensor
        self.offloaded.append(_Offloaded(tensor))
        _get_current_dispatch_mode().offload(_bytes([tensor]))
        return self.offloaded[-1]

    def unpack(self, saved):
        """Return the saved tensor; prefetch this group and the group before it."""
        if isinstance(saved, torch.Tensor):
            return saved
        self.prefetch()
        if (previous := self.previous()) is not None:
            previous.prefetch()
        tensor, saved.tensor, saved.is_returned = saved.tensor, None, True
        return tensor

    def prefetch(self) -> None:
        """Make offloaded tensors live again. Skip those that are live or were already returned."""
        for saved in self.offloaded:
            if saved.tensor is None and not saved.is_returned:
                saved.tensor = torch.empty_strided(saved.shape, saved.stride, dtype=saved.dtype, device="meta")


class _Offloaded:
    """The shape of an offloaded tensor, and the tensor while it is on the device again."""

    def __init__(self, tensor):
        self.shape, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        self.tensor, self.is_returned = None, False
