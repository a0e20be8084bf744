"""The frozen base in 4 bits: less memory, but not exact, since the gradient is the rounded model's.

bitsandbytes' NF4 (arXiv 2305.14314) has the gradient at a layer's inputs, which is all that an
adapter needs.
"""

import importlib.util

import torch
from torch import nn


def quantize_base(transformer: nn.Module, device: torch.device) -> None:
    """Replace the blocks' frozen linear layers by 4-bit ones on the device, in place.

    Call it after `add_adapter`. Layers move to the device and are rounded one by one, so that the
    whole base is never there. Biases, norms, embeddings and trained layers keep their format.

    Raises ValueError if bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise ValueError(f"{missing_library() or 'base_bits=4 needs bitsandbytes'} ({error})") from error

    for parent in list(transformer.transformer_blocks.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear) or layer.weight.requires_grad:
                continue
            sizes, dtype = (layer.in_features, layer.out_features), layer.weight.dtype
            rounded = Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", device="meta")
            rounded.weight = Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            rounded.bias = layer.bias
            parent.register_module(name, rounded.to(device))  # moving it rounds the weight


def missing_library() -> str | None:
    """Return an error message if bitsandbytes is not installed, else None."""
    if importlib.util.find_spec("bitsandbytes"):
        return None
    return "base_bits=4 needs bitsandbytes, which is not installed; pip install bitsandbytes, or leave it out"
