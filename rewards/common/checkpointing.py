"""Gradient checkpointing of frozen layers.

transformers' own switch works in training mode only, which would enable dropout.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint


def recompute_in_backward(layers: Iterable[torch.nn.Module]) -> None:
    """Recompute each layer in backward; only its inputs are kept."""
    for layer in layers:
        layer.forward = partial(_checkpointed_forward, layer.forward)


def _checkpointed_forward(forward, *args, **kwargs):
    """Call forward, under PyTorch's checkpoint if gradients are enabled."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
