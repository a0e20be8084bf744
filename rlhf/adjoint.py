"""How the reward's gradient comes back through the denoising steps: one step, one guidance branch at a time.

x_i+1 = x_i + h_i v(x_i), with v the sum of two branches. The gradient a_i of x_i obeys a_i = a_i+1 + h_i J_i^T a_i+1,
and the adapter receives h_i (dv_i/dtheta)^T a_i+1: a step needs x_i and a_i+1 alone, and each branch is a summand of v.
So the forward pass keeps the states x_i. The backward pass first runs through reward and decoder, whose graph is then
freed, then takes the branches one by one, last step first, each run again with a graph of its own. The gradient is the
same; memory no longer grows with the number of steps, at the price of one more forward pass for each step and branch.
"""

from collections.abc import Iterable
from typing import Any

import torch

from rlhf.recompute import recomputed


class Stepwise:
    """A transformer whose calls keep their latents only, and run again in the backward pass.

    In place of the transformer in a sampler, it makes the backward pass that of this file's head.

    Args:
        transformer: any callable of the arguments of `SD3Transformer3DModel.forward`, with a `dtype`.
        parameters: all of its trained tensors; others receive no gradient, and text embeddings neither.
    """

    def __init__(self, transformer, parameters: Iterable[torch.Tensor]):
        self.transformer, self.parameters = transformer, tuple(parameters)

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's number format."""
        return self.transformer.dtype

    def __call__(self, hidden_states: torch.Tensor, *conditions: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor]:
        """(velocity,), as the transformer returns it with return_dict=False."""

        def velocity(latents_BCTHW):
            return self.transformer(latents_BCTHW, *conditions, **kwargs | {"return_dict": False})[0]

        return (recomputed(velocity, hidden_states, parameters=self.parameters),)
