"""A base in 4 bits: adapters get a gradient near the exact one; a missing library is named."""

import sys

import pytest
import torch
import torch.nn.functional as F
from adapted_model import arguments, gradients, model_with_adapter

from rlhf.execution import quantize as module
from rlhf.execution.blocks import BlockRunner
from rlhf.execution.quantize import missing_library, quantize_base


def flat(grads):
    return torch.cat([grad.flatten() for name, grad in grads.items() if "lora" in name])


def held_bytes(module: torch.nn.Module) -> int:
    """What the parameters of a module take, those of quantised layers as they are stored."""
    sizes = {}
    for p in module.parameters():
        for part in _parts(p):
            storage = part.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
    return [part for name in names for part in _parts(getattr(tensor, name))] or [tensor.data]


def test_the_gradient_stays_near_the_exact_one():
    pytest.importorskip("bitsandbytes")
    model, inputs = model_with_adapter(torch.float32, attention_head_dim=64), arguments(torch.float32)
    exact, before = gradients(model, inputs), held_bytes(model.transformer_blocks)
    quantize_base(model, torch.device("cpu"))
    assert held_bytes(model.transformer_blocks) < 0.25 * before
    found = gradients(model, inputs)
    assert found.keys() == exact.keys()
    assert 0.97 < F.cosine_similarity(flat(found), flat(exact), 0) < 0.99999999
    model.run_block = BlockRunner(recompute="all but attention")
    again = gradients(model, inputs)
    torch.testing.assert_close(flat(again), flat(found), rtol=1e-4, atol=1e-5)


def test_a_missing_library_is_named_with_its_pip_line(monkeypatch):
    for name in ("bitsandbytes.nn", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    model = model_with_adapter()
    before = [type(m) for m in model.modules()]
    told = "base_bits=4 needs bitsandbytes, .*; pip install bitsandbytes, or leave it out"
    with pytest.raises(ValueError, match=told):
        quantize_base(model, torch.device("cpu"))
    assert [type(m) for m in model.modules()] == before
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name == "bitsandbytes" or None)
    assert missing_library() is None
