"""Gradient checkpointing of denoising steps: one step, one guidance branch at a time.

x_i+1 = x_i + h_i v(x_i), with v the sum of two branches. The gradient a_i of x_i obeys

    a_i = a_i+1 + h_i J_i^T a_i+1,

and the adapter receives h_i (dv_i/dtheta)^T a_i+1. A step needs x_i and a_i+1 alone, and each
branch is a summand of v. So the forward pass keeps only the states x_i. The
backward pass first runs through reward and decoder and frees their graph. It then takes the
branches one by one, last step first, and runs each again with its own graph. The gradient is the
same. Memory no longer grows with the number of steps; each step and branch costs one more forward
pass.
"""

from collections.abc import Iterable
from typing import Any

import torch

from rlhf.execution.recompute import gradient_checkpoint


class CheckpointedTransformer:
    """A transformer whose calls keep only their latents and run again in the backward pass.

    Args:
        transformer: called as `rlhf.generator.registry` says, with a `dtype`.
        parameters: all trained tensors of the transformer. Nothing else receives a gradient, text
            embeddings included.
    """

    def __init__(self, transformer, parameters: Iterable[torch.Tensor]):
        self.transformer, self.parameters = transformer, tuple(parameters)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the transformer."""
        return self.transformer.dtype

    def __call__(self, hidden_states: torch.Tensor, *conditions: torch.Tensor, **kwargs: Any) -> tuple:
        """Return (velocity,), as the transformer does with return_dict=False."""

        def velocity(latents_BCTHW):
            return self.transformer(latents_BCTHW, *conditions, **kwargs | {"return_dict": False})[0]

        return (gradient_checkpoint(velocity, hidden_states, parameters=self.parameters),)
