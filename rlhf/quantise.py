"""The frozen base in 8 or 4 bits: less memory, other numbers. Not exact: the gradient is that of the rounded model.

8 bits: torchao's weight-only integers, or bitsandbytes' LLM.int8 (arXiv 2208.07339); 4 bits: bitsandbytes' NF4 (arXiv
2305.14314). Either sends gradients to the inputs of a layer, which is all that an adapter needs.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import nn


def quantise_base(transformer: torch.nn.Module, bits: int, device: torch.device) -> str:
    """Replace the frozen linear layers of all blocks, in place, after the adapter was added. The library that did it.

    One layer after the other is moved to the device and rounded there, so that the whole base is never on it.

    Biases, norms, embeddings, what is trained and the rest of the transformer stay as they are.

    Raises ValueError if no library for it is there.
    """
    failures = []
    for library, quantise in _LIBRARIES[bits].items():
        try:
            quantise(transformer.transformer_blocks, device)
        except ImportError as error:
            failures.append(str(error))
        else:
            return library
    raise ValueError(f"{missing_library(bits)} ({'; '.join(failures)})")


def missing_library(bits: int) -> str | None:
    """What to say where no library for so many bits is installed; None where one is."""
    names = list(_LIBRARIES[bits])
    if any(importlib.util.find_spec(name) for name in names):
        return None
    return (
        f"base_bits={bits} needs {' or '.join(names)}, which is not installed; pip install {names[0]}, or leave it out"
    )


def _is_frozen_linear(module: nn.Module, name: str = "") -> bool:
    return isinstance(module, nn.Linear) and not module.weight.requires_grad


def _torchao_8(blocks: nn.Module, device: torch.device) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(blocks, Int8WeightOnlyConfig(), filter_fn=_is_frozen_linear, device=device)


def _bitsandbytes_8(blocks: nn.Module, device: torch.device) -> None:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    def make(layer):
        new = Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False, device="meta")
        new.weight = Int8Params(layer.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        return new

    _replace(blocks, make, device)


def _bitsandbytes_4(blocks: nn.Module, device: torch.device) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    def make(layer):
        sizes, dtype = (layer.in_features, layer.out_features), layer.weight.dtype
        new = Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", device="meta")
        new.weight = Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        return new

    _replace(blocks, make, device)


def _replace(blocks: nn.Module, make: Callable[[nn.Linear], nn.Linear], device: torch.device) -> None:
    """Put make(layer) in the place of each frozen linear layer; moving it to the device rounds the weight."""
    for parent in list(blocks.modules()):
        for name, layer in list(parent.named_children()):
            if _is_frozen_linear(layer):
                new = make(layer)
                new.bias = layer.bias
                parent.register_module(name, new.to(device))


_LIBRARIES = {
    8: {"torchao": _torchao_8, "bitsandbytes": _bitsandbytes_8},
    4: {"bitsandbytes": _bitsandbytes_4},
}
