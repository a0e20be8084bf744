"""A block's linear layers where no gradient is recorded: fewer and larger products, the same numbers but for rounding.

peft computes x W^T + b, then x A^T, then its product with B^T, layer by layer, and reads x each time. Here the W of the
layers that read the same x, and below them their A, lie in one matrix, of which the modules' own parameters are views:
one product reads x once, and what an optimizer step or a file writes into the parameters is in the matrix, too.

Shape legend: B batch, N tokens, D width, R rank of an adapter, O rows of the matrix.
"""

from operator import attrgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import nn

# Of an attention module: the layers that read the same tokens.
GROUPS = {
    "video": ("to_q", "to_k", "to_v"),
    "text": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "video_out": ("to_out.0",),
    "text_out": ("to_add_out",),
}
ALIGNMENT = 8  # rows of the result start at multiples of 16 bytes: products of others are slower
# A product, bias and tanh-GELU in one kernel; the activation on a CPU is another one.
PRODUCT_WITH_GELU = getattr(torch, "_addmm_activation", None)


class Stack(NamedTuple):
    """The layers of a group as one product, and the rest of their adapters."""

    weight_OD: torch.Tensor
    bias_O: torch.Tensor
    ups: list[torch.Tensor]  # B of each layer, (D, R)
    scales: list[float]


class StackedProjections:
    """The attention projections of a transformer's blocks, stacked in place. Called with a block: its stacks by group.

    A group is left to its modules where one of them has no adapter, or more than the W, A and B of one. So it is while
    the adapter is off or merged, and after parameters were given other memory, as by moving the transformer.
    """

    def __init__(self, blocks):
        self._groups = {}
        for block in blocks:
            layers = {name: [attrgetter(path)(block.attn) for path in paths] for name, paths in GROUPS.items()}
            self._groups[block] = {name: _Group(group) for name, group in layers.items() if all(map(_is_plain, group))}

    def __call__(self, block) -> dict[str, Stack]:
        groups = self._groups.get(block, {})  # a sampling copy has blocks of its own
        return {name: group.stack() for name, group in groups.items() if group.is_current()}


def project(attn, group: str, x_BND: torch.Tensor, stacks: dict[str, Stack] | None) -> list[torch.Tensor]:
    """What each layer of the group makes of x; the modules do it where there is no stack."""
    if not stacks or group not in stacks:
        return [attn.get_submodule(path)(x_BND) for path in GROUPS[group]]
    weight, bias, ups, scales = stacks[group]
    sizes = [*(up.shape[0] for up in ups), *(up.shape[1] for up in ups)]
    pieces = F.linear(x_BND, weight, bias).split([*sizes, len(weight) - sum(sizes)], -1)
    results = []
    for base, low, up, scale in zip(pieces, pieces[len(ups) :], ups, scales, strict=False):
        results.append(base.add(F.linear(low, up), alpha=scale))
    return results


def feed_forward(ff, x_BND: torch.Tensor, stacks: dict[str, Stack] | None) -> torch.Tensor:
    """ff(x); on CUDA, without gradient (there are stacks, if of no group), its activation is part of the product."""
    first, last = ff.net[0], ff.net[-1]
    if stacks is None or not x_BND.is_cuda or PRODUCT_WITH_GELU is None or type(first.proj) is not nn.Linear:
        return ff(x_BND)
    hidden = PRODUCT_WITH_GELU(first.proj.bias, x_BND.flatten(0, 1), first.proj.weight.t(), use_gelu=True)
    return last(hidden.unflatten(0, x_BND.shape[:2]))


class _Group:
    """Layers with the same input; makes their parameters views of two tensors."""

    def __init__(self, layers: list[Linear]):
        self.layers = layers
        weights, biases, downs = zip(*map(_stacked_parameters, layers), strict=True)
        rows = -(-sum(map(len, weights + downs)) // ALIGNMENT) * ALIGNMENT
        self.weight, self.bias = _become_views(weights + downs, rows), _become_views(biases, rows)
        self.addresses = self._addresses()

    def is_current(self) -> bool:
        return all(map(_is_plain, self.layers)) and self._addresses() == self.addresses

    def stack(self) -> Stack:
        adapters = [(layer, layer.active_adapters[0]) for layer in self.layers]
        ups = [layer.lora_B[name].weight for layer, name in adapters]
        return Stack(self.weight, self.bias, ups, [layer.scaling[name] for layer, name in adapters])

    def _addresses(self) -> list[int]:
        return [p.data_ptr() for layer in self.layers for p in _stacked_parameters(layer)]


def _stacked_parameters(layer: Linear) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """W (D_out, D), b (D_out,), A (R, D)."""
    base = layer.base_layer
    return base.weight, base.bias, layer.lora_A[layer.active_adapters[0]].weight


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is, at this moment, x W^T + b + s (x A^T) B^T in one format."""
    if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear or layer.base_layer.bias is None:
        return False
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,), base = layer.active_adapters, layer.base_layer
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_B[name].bias is not None:
        return False
    return type(layer.lora_dropout[name]) is nn.Identity and layer.lora_A[name].weight.dtype == base.weight.dtype


def _become_views(parameters: tuple[nn.Parameter, ...], rows: int) -> torch.Tensor:
    """The parameters one below the other, then zeros; they become views of it, and their old memory is free."""
    whole, sizes = parameters[0].data.new_zeros(rows, *parameters[0].shape[1:]), list(map(len, parameters))
    for p, part in zip(parameters, whole[: sum(sizes)].split(sizes), strict=True):
        part.copy_(p.data)
        p.data = part
    return whole
