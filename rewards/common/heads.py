"""Heads on image embeddings: linear layers without activations, by hand, in the layout of their published files."""

from collections.abc import Callable

import torch

from rewards.common.weights import filled, load_state_dict


class LinearLayers(torch.nn.Sequential):
    """width-1024-128-64-16-1. Identities stand where training had dropout, so that keys agree.

    Nothing bends between the layers: the score is one linear function of the embedding, and has no ceiling.
    """

    def __init__(self, width: int, dropout_before_last: bool = False):
        linear, dropout = torch.nn.Linear, torch.nn.Identity
        layers = [linear(width, 1024), dropout(), linear(1024, 128), dropout(), linear(128, 64), dropout()]
        layers += [linear(64, 16), *([dropout()] if dropout_before_last else []), linear(16, 1)]
        super().__init__(*layers)


def load_head(name: str, path: str, prefix: str, build: Callable[[int], torch.nn.Module]) -> torch.nn.Module:
    """build(width) with the float32 weights of a file whose keys begin with `prefix`. Raises RewardError.

    The width of the embedding is that of the file's first matrix.
    """
    state = {key.removeprefix(prefix): tensor for key, tensor in load_state_dict(name, path).items()}
    tensors = {key: tensor.float() for key, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    width = next((tensor.shape[1] for tensor in tensors.values() if tensor.ndim == 2), 1)
    return filled(name, str(path), lambda: build(width), state | tensors)
