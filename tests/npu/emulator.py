"""An NPU in software: CPU kernels compute the operators on NPU tensors, over the same memory.

Strict where the device is: no float64 and no complex tensor, no operator without a kernel of
torch_npu's own, no mixing with tensors or generators of the CPU. What it proves is which operators
run, with which arguments, and that their gradients are wired up; not the device's numerics, speed
or memory.
"""

import ctypes
from collections import Counter
from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten, npu = torch.ops.aten, torch.ops.npu
METADATA_ONLY = {  # these run as they are: they allocate, or look at no element
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.set_.source_Storage_storage_offset,
    aten.record_stream.default,
}
COPIES = {aten._to_copy.default, aten.copy_.default}
INDICES_FROM_CPU = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
FUSED = (torch.float16, torch.bfloat16, torch.float32)


class EmulatedNPU(TorchDispatchMode):
    """A mode in which NPU tensors can be computed with; `calls` counts its operators by name."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = _device(args, kwargs)
        if device is None:
            return func(*args, **kwargs)
        self.calls[str(func)] += 1
        _check_operator(func)
        _check_operands(func, args, kwargs)
        if func is aten._local_scalar_dense.default:
            return _on_cpu(args[0]).item()
        result = (
            func(*args, **kwargs) if func.is_view or func in METADATA_ONLY else _compute(func, args, kwargs, device)
        )
        _check_dtypes(func, result)
        return result


def _device(args, kwargs) -> torch.device | None:
    """Return the NPU in a call's arguments, of the device or of a tensor; None without one."""
    asked = kwargs.get("device")
    if asked is not None and torch.device(asked).type == "npu":
        return torch.device(asked)
    return next((x.device for x in tree_leaves((args, kwargs)) if _is_npu(x)), None)


def _is_npu(x) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type == "npu"


@cache
def _check_operator(func) -> None:
    name = func.name()
    if func.namespace == "npu" and func not in KERNELS:
        raise NotImplementedError(f"the emulated NPU has no {name}, expected one of {len(KERNELS)}; add it to KERNELS")
    if not _has_kernel(func):
        raise NotImplementedError(f"torch_npu has no kernel for {name}: it would run on the host; use another operator")


def _has_kernel(func) -> bool:
    """Return whether torch_npu has a kernel, also with out=, or PyTorch composes it of others."""
    overloads = [getattr(func.overloadpacket, name) for name in func.overloadpacket.overloads()]
    variants = [overload for overload in overloads if any(a.is_out for a in overload._schema.arguments)]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(has(o.name(), key) for o in [func, *variants] for key in ("PrivateUse1", "CompositeExplicitAutograd"))


def _check_operands(func, args, kwargs) -> None:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    _check_dtypes(func, [x for x in tensors if _is_npu(x)])
    strangers = [x for x in tensors if not _is_npu(x) and x.dim() > 0]
    if strangers and func not in COPIES | INDICES_FROM_CPU:
        raise RuntimeError(f"{func} got tensors of the NPU and of {strangers[0].device}, expected one device")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != "npu":
        raise RuntimeError(f"{func} got a generator of {generator.device}, expected one of the NPU")


def _check_dtypes(func, tensors) -> None:
    for x in tree_leaves(tensors):
        if _is_npu(x) and (x.dtype == torch.float64 or x.dtype.is_complex):
            raise TypeError(f"{func} has a {x.dtype} tensor on the NPU, expected none; make it on the CPU")


def _compute(func, args, kwargs, device: torch.device):
    """Run an operator on CPU views of the device's memory; copy new results to the device."""
    originals: dict[int, torch.Tensor] = {}

    def view(x):
        if not _is_npu(x):
            return x
        seen = _on_cpu(x)
        originals[id(seen)] = x
        return seen

    cpu_args, cpu_kwargs = tree_map_only(torch.Tensor, view, (args, dict(kwargs)))
    to_cpu = func is aten._to_copy.default and torch.device(kwargs.get("device") or device).type == "cpu"
    cpu_kwargs |= {key: "cpu" for key in ("device",) if key in kwargs}
    cpu_kwargs |= {key: None for key in ("generator", "pin_memory") if key in kwargs}
    if func in KERNELS:
        names = [argument.name for argument in func._schema.arguments]
        result = KERNELS[func](**dict(zip(names, cpu_args, strict=False)), **cpu_kwargs)
    else:
        result = func(*cpu_args, **cpu_kwargs)

    def back(x):
        if id(x) in originals:  # written in place
            return originals[id(x)]
        if to_cpu or any(x is y for y in tree_leaves((args, kwargs))):
            return x
        new = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        _on_cpu(new).copy_(x)
        return new

    return tree_map_only(torch.Tensor, back, result)


def _on_cpu(x: torch.Tensor) -> torch.Tensor:
    """Return a CPU tensor over an NPU tensor's memory, which the stand-in keeps on the host."""
    storage = x.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    memory.tensor = x  # which keeps the memory
    raw = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(raw, x.storage_offset(), x.shape, x.stride())


# -------------------- kernels that the CPU lacks, with the argument names of torch_npu's schemas


def fusion_attention(query, key, value, scale=1.0, **settings):
    """Return softmax(q k^T * scale) v for (B, H, N, W); each row's maximum and sum, eight times."""
    logits = _logits(query, key, scale, **settings)
    highest = logits.amax(-1, keepdim=True)
    weights = (logits - highest).exp()
    total = weights.sum(-1, keepdim=True)
    out = ((weights / total) @ value.float()).to(query.dtype)
    highest, total = (x.expand(*x.shape[:-1], 8).contiguous() for x in (highest, total))
    seed, offset = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    return out, highest, total, torch.empty(0, dtype=query.dtype), seed, offset


def fusion_attention_grad(query, key, value, dy, scale_value=1.0, **settings):
    p = _logits(query, key, scale_value, **settings).softmax(-1)
    dp = dy.float() @ value.float().transpose(-1, -2)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale_value
    dq, dk, dv = ds @ key.float(), ds.transpose(-1, -2) @ query.float(), p.transpose(-1, -2) @ dy.float()
    return *(x.to(query.dtype).contiguous() for x in (dq, dk, dv)), torch.empty(0, dtype=query.dtype), torch.empty(0)


def _logits(q, k, scale, *, head_num, input_layout, atten_mask=None, sparse_mode=0, keep_prob=1.0, **_):
    """Return q k^T * scale; -inf where atten_mask is True, or, in mode 2, above the diagonal."""
    if input_layout != "BNSD" or q.shape[1] != head_num or q.dtype not in FUSED or keep_prob != 1:
        raise NotImplementedError(f"attention in {input_layout}, {q.dtype}, {head_num} heads, shape {tuple(q.shape)}")
    if sparse_mode not in (0, 2) or (atten_mask is not None and atten_mask.dtype != torch.bool):
        raise NotImplementedError(f"attention with sparse_mode={sparse_mode} and a {atten_mask.dtype} mask")
    if sparse_mode == 2:
        atten_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    logits = (q.float() @ k.float().transpose(-1, -2)) * scale
    return logits if atten_mask is None else logits.masked_fill(atten_mask, float("-inf"))


def rms_norm(input, gamma, epsilon=1e-6):
    rstd = torch.rsqrt(input.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return (input.float() * rstd).to(input.dtype) * gamma, rstd


def rms_norm_backward(dy, input, gamma, rstd):
    normed, weighted = input.float() * rstd, dy.float() * gamma.float()
    dx = rstd * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    return dx.to(input.dtype), (dy.float() * normed).flatten(0, -2).sum(0)


def matmul_backward(grad, self, other, mask):
    da = (grad @ other.transpose(-1, -2)).sum_to_size(self.shape) if mask[0] else torch.empty(0)
    db = (self.transpose(-1, -2) @ grad).sum_to_size(other.shape) if mask[1] else torch.empty(0)
    return da, db


KERNELS = {
    npu.npu_fusion_attention_v3.default: fusion_attention,
    npu.npu_fusion_attention_grad_v3.default: fusion_attention_grad,
    npu.npu_rms_norm.default: rms_norm,
    npu.npu_rms_norm_backward.default: rms_norm_backward,
    npu._npu_dtype_cast.default: lambda input, dtype: input.to(dtype),
    npu._npu_dtype_cast_backward.default: lambda grad, dtype: grad.to(dtype),
    aten.matmul_backward.default: matmul_backward,
}
