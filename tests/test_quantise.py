"""A base in few bits: adapters still get a gradient near the exact one, and a missing library is named."""

import sys

import pytest
import torch
import torch.nn.functional as F
from adapted_model import arguments, gradients, model_with_adapter

from rlhf import quantise as module
from rlhf.contentv.blocks import BlockRunner
from rlhf.quantise import _bitsandbytes_4, _bitsandbytes_8, _torchao_8, missing_library, quantise_base

NEEDS = {_torchao_8: "torchao", _bitsandbytes_8: "bitsandbytes", _bitsandbytes_4: "bitsandbytes"}


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


@pytest.mark.parametrize(
    ("quantise", "cosine", "size"),
    [(_torchao_8, 0.999, 0.38), (_bitsandbytes_8, 0.999, 0.38), (_bitsandbytes_4, 0.97, 0.25)],
)
def test_the_gradient_stays_near_the_exact_one(quantise, cosine, size):
    pytest.importorskip(NEEDS[quantise])
    model, inputs = model_with_adapter(torch.float32, attention_head_dim=64), arguments(torch.float32)
    exact, before = gradients(model, inputs), held_bytes(model.transformer_blocks)
    quantise(model.transformer_blocks, torch.device("cpu"))
    assert held_bytes(model.transformer_blocks) < size * before
    found = gradients(model, inputs)
    assert found.keys() == exact.keys()
    assert cosine < F.cosine_similarity(flat(found), flat(exact), 0) < 0.99999999
    model.run_block = BlockRunner(recompute="all but attention")
    again = gradients(model, inputs)
    torch.testing.assert_close(flat(again), flat(found), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bits", "library"), [(8, "torchao"), (4, "bitsandbytes")])
def test_a_missing_library_is_named_with_its_pip_line(monkeypatch, bits, library):
    for name in ("torchao.quantization", "torchao", "bitsandbytes.nn", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    model = model_with_adapter()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=f"base_bits={bits} needs .*; pip install {library}, or leave it out"):
        quantise_base(model, bits, torch.device("cpu"))
    assert [type(m) for m in model.modules()] == before
    assert missing_library(bits).startswith(f"base_bits={bits} needs {library}")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name == library or None)
    assert missing_library(bits) is None
