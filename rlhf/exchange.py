"""What processes that share one model hand each other within a forward pass, with the exact gradient of it.

Between them every process holds a part of the computation. Its numbers enter from, and leave to, tensors of which all
processes of the group hold the same copy. A gradient inside is therefore a summand: added up over the group it is the
gradient of the one-process computation. Gradients are made contiguous before they travel: a collective reads a strided
tensor's memory as if it were not.
"""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup


def entering(x: torch.Tensor, group: Group) -> torch.Tensor:
    """x, of which all hold a copy; backwards, the sum of what each process's part sends back."""
    return _SumGradient.apply(x, group, 1.0)


def agreed(x: torch.Tensor, group: Group) -> torch.Tensor:
    """x, of which all hold a copy and from which all compute the same loss; backwards, the mean of their gradients.

    So the copies stay one gradient where a reward or a kernel is not quite the same in every process.
    """
    return _SumGradient.apply(x, group, 1.0 / dist.get_world_size(group))


def gathered(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Every process's x, (size, ...), for a computation that all do alike; backwards, the own part of the gradient."""
    return _Gather.apply(x, group, False)


def gathered_inside(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Every process's x, (size, ...), for different computations; backwards, the sum over them of the own part."""
    return _Gather.apply(x, group, True)


def swapped(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Piece j of x, (size, ...), goes to process j; piece i of the result came from process i."""
    return _AllToAll.apply(x, group)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, weight):
        ctx.group, ctx.weight = group, weight
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _sum(grad, ctx.group).mul_(ctx.weight).to(grad.dtype), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, inside):
        ctx.group, ctx.inside = group, inside
        every = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(every, x.contiguous(), group=group)
        return every.unflatten(0, (-1, x.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        whole = _sum(grad, ctx.group).to(grad.dtype) if ctx.inside else grad
        return whole[dist.get_rank(ctx.group)].contiguous(), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _swap(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _swap(grad, ctx.group), None


def _swap(x: torch.Tensor, group: Group) -> torch.Tensor:
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received


def _sum(grad: torch.Tensor, group: Group) -> torch.Tensor:
    """A new tensor, in at least float32: a sum of rounded summands should not be rounded again on the way."""
    total = grad.to(torch.promote_types(grad.dtype, torch.float32), memory_format=torch.contiguous_format, copy=True)
    dist.all_reduce(total, group=group)
    return total
