"""Linear heads on image embeddings, and weights of a model's several scores."""

import math
from collections.abc import Callable, Sequence

import torch

from rewards.common.weights import build_from_state_dict, load_state_dict
from rewards.contract import RewardError


class LinearLayers(torch.nn.Sequential):
    """Linear layers width-1024-128-64-16-1 without activations, with the published keys.

    Identities stand in place of the dropout of training, so that keys agree. The score is one
    linear function of the embedding and has no upper bound.
    """

    def __init__(self, width: int, dropout_before_last: bool = False):
        """Build the layers; dropout_before_last adds an identity before the last one."""
        linear, dropout = torch.nn.Linear, torch.nn.Identity
        layers = [linear(width, 1024), dropout(), linear(1024, 128), dropout(), linear(128, 64), dropout()]
        layers += [linear(64, 16), *([dropout()] if dropout_before_last else []), linear(16, 1)]
        super().__init__(*layers)


def load_head(name: str, path: str, prefix: str, build: Callable[[int], torch.nn.Module]) -> torch.nn.Module:
    """Return build(width) with a file's float32 weights, `prefix` stripped from their keys.

    The width of the embedding is read from the first matrix of the file. Raises RewardError for a
    damaged file or another layout.
    """
    state = {key.removeprefix(prefix): tensor for key, tensor in load_state_dict(name, path).items()}
    tensors = {key: tensor.float() for key, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    width = next((tensor.shape[1] for tensor in tensors.values() if tensor.ndim == 2), 1)
    return build_from_state_dict(name, str(path), lambda: build(width), state | tensors)


def dimension_weights(
    name: str, dimension: str | dict[str, float], known: Sequence[str], whole: str, each: float
) -> list[float]:
    """Return each known dimension's weight; dimension: a name, {name: weight} or `whole`.

    `whole` names the sum of all dimensions with the weight `each`. Raises RewardError for unknown
    names and weights that are not finite.
    """
    chosen = {dimension: 1.0} if isinstance(dimension, str) else dimension
    if chosen == {whole: 1.0}:
        return [each] * len(known)
    is_valid = isinstance(chosen, dict) and chosen and set(chosen) <= set(known)
    if not is_valid or not all(isinstance(x, int | float) and math.isfinite(x) for x in chosen.values()):
        expected = f"one of {', '.join(known)} or {whole}, or a weight for some of them, such as {{{known[0]}: 2}}"
        raise RewardError(name, got=f"dimension={dimension!r}", expected=expected, cure="correct dimension")
    return [float(chosen.get(one, 0.0)) for one in known]
