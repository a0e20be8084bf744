"""Runs code on tensors without storage and counts what it would hold, compute and move on an accelerator.

Tensors of the device "meta" have shapes and lifetimes but no numbers: the very functions that train, run on them, tell
in a second what they would need at full size. Shape legend: B batch, H heads, N tokens, W width of a head.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rlhf.contentv.transformer import QueryKeyNorm
from rlhf.host_memory import HostMemory

KINDS = {"convolution": "conv", "convolution_backward": "conv backward"}
_RUNNING: list["Trace"] = []
ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


@dataclass(frozen=True)
class Operation:
    """One kind of call. kind: matrix, conv, conv backward, attention, attention backward, exchange, or other.

    The last two are bound by what is moved: between processes, and within the device's memory.
    """

    kind: str
    dtype: str  # such as "bfloat16"
    flops: int
    bytes: int  # read and written; of an exchange: sent


@dataclass
class Phase:
    """What a part of the code took. Bytes on the device, parameters left out."""

    start: int  # held before
    end: int = 0  # and after
    most: int = 0  # and in between
    work: Counter[Operation] = field(default_factory=Counter)
    calls: int = 0  # of operators, from Python
    calls_of_autograd: int = 0  # and from its engine, which is faster


class Trace(TorchDispatchMode):
    """Counts what runs inside. held: modules whose parameters and buffers are not counted.

    with Trace(module) as trace:
        with trace.phase() as forward:
            y = module(x)
        with trace.phase() as backward:
            y.backward(...)
    """

    def __init__(self, *held: nn.Module):
        super().__init__()
        own = (t for module in held for t in (*module.parameters(), *module.buffers()))
        self.not_counted = {t.untyped_storage()._cdata for t in own}
        self.alive: dict[int, int] = {}
        self.now, self.phases = 0, []

    def __enter__(self):
        _RUNNING.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        _RUNNING.pop()
        return super().__exit__(*error)

    @staticmethod
    def current() -> "Trace":
        """The innermost one that runs."""
        return _RUNNING[-1]

    def know(self, tensor: torch.Tensor) -> None:
        """Do not count what was there before."""
        self.not_counted.add(tensor.untyped_storage()._cdata)

    @contextmanager
    def phase(self) -> Iterator[Phase]:
        """What happens inside is counted in this phase, and in those around it."""
        phase = Phase(self.now, most=self.now)
        self.phases.append(phase)
        try:
            yield phase
        finally:
            phase.end = self.now
            self.phases.remove(phase)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        for x in outputs:
            self._hold(x)
        self._count(_operation(func, args, kwargs, out, inputs, outputs))
        return out

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(B, H, N, W) each: what fused kernels take in place of `F.scaled_dot_product_attention`."""
        return _Attention.apply(self, query, key, value)

    def _count(self, operation: Operation) -> None:
        by_engine = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        for phase in self.phases:
            phase.work[operation] += 1
            phase.calls += not by_engine
            phase.calls_of_autograd += by_engine
            phase.most = max(phase.most, self.now)

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type != "meta" or key in self.not_counted or key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "bfloat16", as an `Operation` has it."""
    return str(dtype).removeprefix("torch.")


def _operation(func, args, kwargs, out, inputs, outputs) -> Operation:
    name = func.overloadpacket.__name__
    if func.namespace == "c10d":
        return Operation("exchange", dtype_name(inputs[0].dtype), 0, _sent(name, inputs))
    dtype = dtype_name(outputs[0].dtype if outputs else torch.float32)
    if func.overloadpacket in flop_registry:
        flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        return Operation(KINDS.get(name, "matrix"), dtype, flops, _bytes(inputs + outputs))
    moved = 0 if _moves_nothing(func, name, inputs, outputs) else _bytes(inputs + outputs)
    return Operation("other", dtype, 0, moved)


def _sent(name: str, tensors: list[torch.Tensor]) -> int:
    """Bytes that each process sends. tensors: those that are summed; or where the result goes, and what is sent."""
    times = {"allreduce_": 2, "_allgather_base_": 1, "alltoall_base_": 1}[name]  # a sum by a ring goes round twice
    size = dist.get_world_size()
    return times * _bytes(tensors[:1]) * (size - 1) // size


@contextmanager
def pretended_group(size: int) -> Iterator[dist.ProcessGroup | None]:
    """The first of so many processes, whose exchanges move nothing; None for one process."""
    if size == 1:
        yield None
        return
    dist.init_process_group("fake", rank=0, world_size=size)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _moves_nothing(func, name: str, inputs, outputs) -> bool:
    """Of views, and of new tensors that nothing is written to."""
    shared = {x.untyped_storage()._cdata for x in inputs} & {x.untyped_storage()._cdata for x in outputs}
    return name in ALLOCATIONS or bool(shared and not func._schema.is_mutable)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


# ------------------------------------------------------------------------ what kernels of an accelerator do otherwise


class _Attention(torch.autograd.Function):
    """Keeps what attention kernels keep: query, key, value, result, and a log-sum-exp for each row."""

    @staticmethod
    def forward(ctx, trace, query, key, value):
        result = torch.empty_like(value)
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        ctx.trace = trace
        trace._count(_attention_operation("attention", query))
        return result

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        sums = query.new_empty(query.shape, dtype=torch.float32)  # of the query's gradient, over blocks of keys
        ctx.trace._count(_attention_operation("attention backward", query))
        found = tuple(torch.empty_like(x) for x in (query, key, value))
        del sums
        return None, *found


def _attention_operation(kind: str, query_BHNW: torch.Tensor) -> Operation:
    """Two products of N x N x W for each head; in the backward pass five."""
    *rows, width = query_BHNW.shape
    products = 2 if kind == "attention" else 5
    flops = 2 * products * prod(rows) * rows[-1] * width
    return Operation(kind, dtype_name(query_BHNW.dtype), flops, 0)


class _Norm(QueryKeyNorm):
    """As one kernel: keeps its input and a number for each row. On "meta" PyTorch takes the norm apart."""

    def forward(self, hidden_states):
        return _RmsNorm.apply(hidden_states)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.neg(x)  # as much to read and to write

    @staticmethod
    def backward(ctx, grad):
        (x, _) = ctx.saved_tensors
        return torch.add(x, grad)


def use_fused_norms(transformer: nn.Module) -> None:
    """Have the norms of query and key count as one kernel each, in place."""
    for module in transformer.modules():
        if isinstance(module, QueryKeyNorm):
            module.__class__ = _Norm


class Elsewhere(HostMemory):
    """Host memory of no size: what is put there leaves the device, and comes back as from a `HostMemory`."""

    def __init__(self, smallest_bytes: int = 2**20):
        super().__init__("cpu", smallest_bytes)

    def group(self) -> "_Group":
        """A new group, after all those before."""
        group = _Group(self.smallest_bytes, self.last)
        self.last = weakref.ref(group)
        return group


class _Group:
    """As `rlhf.host_memory.Group`."""

    def __init__(self, smallest_bytes: int, previous):
        self.smallest_bytes, self.previous, self.kept = smallest_bytes, previous, []

    def pack(self, tensor):
        if _bytes([tensor]) < self.smallest_bytes or isinstance(tensor, nn.Parameter):
            return tensor
        self.kept.append(_Kept(tensor))
        return self.kept[-1]

    def unpack(self, kept):
        if isinstance(kept, torch.Tensor):
            return kept
        self.ask_back()
        if (previous := self.previous()) is not None:
            previous.ask_back()
        tensor, kept.tensor, kept.given = kept.tensor, None, True
        return tensor

    def ask_back(self) -> None:
        for kept in self.kept:
            if kept.tensor is None and not kept.given:
                kept.tensor = torch.empty_strided(kept.shape, kept.stride, dtype=kept.dtype, device="meta")


class _Kept:
    def __init__(self, tensor):
        self.shape, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        self.tensor, self.given = None, False
