"""Gradient checkpointing: functions that keep only their inputs and run again in the backward pass.

Unlike in `torch.utils.checkpoint`, the first run records no graph at all, so that checkpointed
functions nest at no cost. The inputs of one call are saved together, so that they can be offloaded
together.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from rlhf.execution.offload import OffloadGroup


def gradient_checkpoint(
    function: Callable,
    *inputs: torch.Tensor | None,
    parameters: Iterable[torch.Tensor] = (),
    offload: OffloadGroup | None = None,
) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
    """Return function(*inputs) and recompute it in backward; tensors may be None.

    The gradient is exact if the function is deterministic.

    Args:
        parameters: trained tensors that the function reads besides its inputs.
        offload: keeps the inputs in host memory; None: on the device.
    """
    parameters = tuple(parameters)
    tensors = (x for x in (*inputs, *parameters) if x is not None)
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
        return function(*inputs)
    with offload_saved_tensors(offload):
        return _Checkpoint.apply(function, len(inputs), *inputs, *parameters)


def offload_saved_tensors(offload: OffloadGroup | None) -> AbstractContextManager:
    """Return a context in which autograd saves its tensors in the group; None: as usual."""
    return saved_tensors_hooks(offload.pack, offload.unpack) if offload else nullcontext()


class _Checkpoint(torch.autograd.Function):
    """The autograd function of `gradient_checkpoint`."""

    @staticmethod
    def forward(ctx, function, num_inputs, *tensors):
        """Call the function; save its inputs, which come before the parameters in `tensors`."""
        ctx.set_materialize_grads(False)
        ctx.function, ctx.parameters = function, tensors[num_inputs:]
        ctx.save_for_backward(*tensors[:num_inputs])
        return function(*tensors[:num_inputs])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        """Call the function again; return the gradients of its inputs and parameters."""
        inputs = as_leaves(ctx.saved_tensors, ctx.needs_input_grad[2:])
        for x in inputs:
            if x is not None and x.requires_grad:
                x.register_hook(_detach_from_storage)
        with torch.enable_grad():
            outputs = ctx.function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return None, None, *gradients(outputs, (*inputs, *ctx.parameters), grads)


def _detach_from_storage(grad: torch.Tensor | None) -> torch.Tensor | None:
    """Copy a gradient that is a slice of a larger tensor, which it would keep alive.

    `cat` sends such slices to its inputs. None comes from a nested checkpoint to an input that its
    result does not depend on.
    """
    return grad.clone() if grad is not None and grad.untyped_storage().nbytes() > grad.nbytes else grad


def as_leaves(tensors: Iterable[torch.Tensor | None], needs_grad: Iterable[bool]) -> list[torch.Tensor | None]:
    """Return the tensors detached, as leaves of a new graph."""
    pairs = zip(tensors, needs_grad, strict=False)
    return [None if x is None else x.detach().requires_grad_(needed) for x, needed in pairs]


def gradients(outputs: tuple, inputs: tuple, grads: tuple) -> list[torch.Tensor | None]:
    """Return the gradients at inputs, given those of outputs; None where there is none."""
    reached = [(y, grad) for y, grad in zip(outputs, grads, strict=True) if grad is not None and y.requires_grad]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    if not reached or not wanted:
        return [None] * len(inputs)
    reached_outputs, reached_grads = zip(*reached, strict=True)
    found = iter(torch.autograd.grad(reached_outputs, wanted, reached_grads, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]
