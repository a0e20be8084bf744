"""Differentiable collectives between the ranks that share one forward pass.

Between `copy_to_group` and `all_gather` each rank computes a part; outside, tensors are the same on
every rank. A gradient inside is a summand: its sum over the group is the gradient of a single
process. Gradients are made contiguous first: a collective reads a strided tensor's memory in order.
"""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup


def copy_to_group(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Return x for a different computation on each rank; in backward, sum its gradients."""
    return _SumGradient.apply(x, group, 1.0)


def average_grad(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Return x for the same computation on every rank; in backward, average its gradient.

    The ranks then continue with one gradient, even if a reward or a kernel is not quite
    deterministic.
    """
    return _SumGradient.apply(x, group, 1.0 / dist.get_world_size(group))


def all_gather(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Return every rank's x, (size, ...); in backward, take this rank's part of the gradient."""
    return _AllGather.apply(x, group)


def all_gather_sum_grad(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Return every rank's x, (size, ...); in backward, sum gradients and take this rank's part."""
    return copy_to_group(all_gather(x, group), group)


def all_to_all(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Send x[j] to rank j and return the received pieces, rank i's at i. x: (size, ...)."""
    return _AllToAll.apply(x, group)


class _SumGradient(torch.autograd.Function):
    """The identity, whose gradient is summed over the group and multiplied by `weight`."""

    @staticmethod
    def forward(ctx, x, group, weight):
        """Return x."""
        ctx.group, ctx.weight = group, weight
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Return the sum over the group, times `weight`.

        It is summed in at least float32, so that partial sums are not rounded.
        """
        dtype = torch.promote_types(grad.dtype, torch.float32)
        total = grad.to(dtype, memory_format=torch.contiguous_format, copy=True)
        dist.all_reduce(total, group=ctx.group)
        return total.mul_(ctx.weight).to(grad.dtype), None, None


class _AllGather(torch.autograd.Function):
    """An all-gather, whose gradient is this rank's part."""

    @staticmethod
    def forward(ctx, x, group):
        """Return the x of all ranks."""
        ctx.group = group
        gathered = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered.unflatten(0, (-1, x.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Return the gradient of this rank's x."""
        return grad[dist.get_rank(ctx.group)].contiguous(), None


class _AllToAll(torch.autograd.Function):
    """An all-to-all, which is its own transpose."""

    @staticmethod
    def forward(ctx, x, group):
        """Return the received pieces."""
        ctx.group, x = group, x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx, grad):
        """Send each piece's gradient back to the rank it came from."""
        return all_to_all(grad, ctx.group), None
