"""Messages between a reward server and a run: safetensors with facts as JSON, never pickles."""

import json
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save

PROTOCOL = 1  # to be raised with every change of what is sent
TOKEN_VARIABLE = "CONTENTV_RLHF_REWARD_TOKEN"


def pack(facts: dict[str, Any], **tensors: torch.Tensor) -> bytes:
    """Return facts and tensors as one message. Raises TypeError for facts that JSON does not have.

    A tensor keeps the order of its dimensions in memory, since sums over pixels are rounded in that
    order.
    """
    orders = {name: _memory_order(tensor) for name, tensor in tensors.items()}
    written = {name: tensor.detach().cpu().permute(orders[name]).contiguous() for name, tensor in tensors.items()}
    return save(written, {"facts": json.dumps(facts), "orders": json.dumps(orders)})


def unpack(message: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the facts and tensors of `pack`. Raises ValueError for another message."""
    try:
        tensors = load(message)
        length = int.from_bytes(message[:8], "little")
        metadata = json.loads(message[8 : 8 + length])["__metadata__"]
        facts, orders = json.loads(metadata["facts"]), json.loads(metadata["orders"])
        found = {name: tensor.permute(_inverse(orders[name])) for name, tensor in tensors.items()}
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"no safetensors message with facts ({type(error).__name__}: {error})") from error
    if not isinstance(facts, dict):
        raise ValueError(f"facts that are a {type(facts).__name__}, not a mapping")
    return facts, found


def _memory_order(tensor: torch.Tensor) -> list[int]:
    """Return the dimensions from the slowest to the fastest in memory."""
    return sorted(range(tensor.ndim), key=lambda i: -tensor.stride(i) if tensor.shape[i] > 1 else 0)


def _inverse(order: list[int]) -> list[int]:
    """Return the inverse of a permutation."""
    return sorted(range(len(order)), key=order.__getitem__)
