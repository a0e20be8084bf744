"""Functions that keep only their inputs for the backward pass, where they run a second time.

Unlike `torch.utils.checkpoint`, the first run is a true `no_grad` one, so that pieces may lie within pieces at no cost,
and the inputs of one call are kept together, so that they can wait in host memory and come back together.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from rlhf.host_memory import Group


def recomputed(
    function: Callable,
    *inputs: torch.Tensor | None,
    parameters: Iterable[torch.Tensor] = (),
    place: Group | None = None,
) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
    """function(*inputs), tensors or None in and out; the backward pass calls it again. Exact if it is deterministic.

    Args:
        parameters: the trained tensors that function reads besides its inputs; they receive their gradient.
        place: where the inputs are kept; None: where they are.
    """
    parameters = tuple(parameters)
    tensors = (x for x in (*inputs, *parameters) if x is not None)
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
        return function(*inputs)
    with kept_in(place):
        return _Recomputed.apply(function, len(inputs), *inputs, *parameters)


def kept_in(place: Group | None) -> AbstractContextManager:
    """Inside, what autograd keeps is kept in that place."""
    return saved_tensors_hooks(place.pack, place.unpack) if place else nullcontext()


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, num_inputs, *tensors):
        ctx.set_materialize_grads(False)
        ctx.function, ctx.parameters = function, tensors[num_inputs:]
        ctx.save_for_backward(*tensors[:num_inputs])
        return function(*tensors[:num_inputs])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        inputs = as_leaves(ctx.saved_tensors, ctx.needs_input_grad[2:])
        for x in inputs:
            if x is not None and x.requires_grad:
                x.register_hook(_of_its_own)
        with torch.enable_grad():
            outputs = ctx.function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return None, None, *gradients(outputs, (*inputs, *ctx.parameters), grads)


def _of_its_own(grad: torch.Tensor | None) -> torch.Tensor | None:
    """A copy of a slice of a larger tensor, such as `cat` sends back to each input: it would hold all of that.

    None is what a piece within this one sends to an input that its result does not depend on.
    """
    return grad.clone() if grad is not None and grad.untyped_storage().nbytes() > grad.nbytes else grad


def as_leaves(tensors: Iterable[torch.Tensor | None], needs_grad: Iterable[bool]) -> list[torch.Tensor | None]:
    """The same numbers as the start of a new graph."""
    pairs = zip(tensors, needs_grad, strict=False)
    return [None if x is None else x.detach().requires_grad_(needed) for x, needed in pairs]


def gradients(outputs: tuple, inputs: tuple, grads: tuple) -> list[torch.Tensor | None]:
    """grads of outputs, None where there is none, brought back to inputs: None where these need or get none."""
    reached = [(y, grad) for y, grad in zip(outputs, grads, strict=True) if grad is not None and y.requires_grad]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    if not reached or not wanted:
        return [None] * len(inputs)
    reached_outputs, reached_grads = zip(*reached, strict=True)
    found = iter(torch.autograd.grad(reached_outputs, wanted, reached_grads, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]
