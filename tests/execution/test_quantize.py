"""A base in 4 bits: adapters get a gradient near the exact one; a missing library is named."""

import sys

import pytest
import torch
import torch.nn.functional as F
from adapted_model import arguments, gradients, model_with_adapter
from problem import Problem, keep_float64
from runs import adapter
from toy_rewards import PROMPTS, redness

from rlhf.adapter.lora_file import read_lora
from rlhf.execution import quantize as module
from rlhf.execution.blocks import BlockRunner
from rlhf.execution.quantize import missing_library, quantize_base
from rlhf.export import main
from rlhf.generator.files import model_sizes
from rlhf.generator.loading import linear_sizes, load_transformer
from rlhf.trainer import RewardGradientTrainer


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


@pytest.mark.parametrize("wan", [False, True], ids=["contentv", "wan"])
def test_velocity_and_gradient_are_those_of_the_dequantised_weights(monkeypatch, wan):
    """A model in float64 has the rounded weights; its gradient is that of finite differences."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    keep_float64(monkeypatch)
    rounded, exact, twin = (Problem(dtype, wan=wan) for dtype in (torch.float32, torch.float64, torch.float64))
    for other in (exact, twin):  # whose adapter and texts were drawn in another format
        other.masters.set(rounded.masters.vector.detach().double())
        other.cond = rounded.cond.to(torch.float64)
    quantize_base(rounded.transformer, torch.device("cpu"))
    layers = {name: layer for name, layer in rounded.transformer.named_modules() if isinstance(layer, Linear4bit)}
    inside = f"{'blocks' if wan else 'transformer_blocks'}."
    assert {name for name in layers if name.startswith(inside)} == {
        name
        for name, layer in twin.transformer.named_modules()
        if type(layer) is torch.nn.Linear and name.startswith(inside) and ".lora_" not in name
    }
    for name, layer in layers.items():
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        twin.transformer.get_submodule(name).weight.data.copy_(weight)
    latents = [p.latents(p.noise, p.sigmas, []) for p in (rounded, twin, exact)]
    torch.testing.assert_close(latents[0].double(), latents[1], rtol=1e-4, atol=1e-5)
    assert (latents[2] - latents[1]).norm() > 1e-3 * latents[2].norm(), "rounding is to be seen"

    gradient = twin.gradient(2)
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    difference = (twin.loss_at(2e-5 * direction, 2) - twin.loss_at(-2e-5 * direction, 2)) / 4e-5
    assert difference == pytest.approx((gradient @ direction).item(), rel=1e-6)
    limit = {"rtol": 1e-3, "atol": 1e-4 * gradient.abs().max().item()}
    torch.testing.assert_close(rounded.gradient(2).double(), gradient, **limit)
    rounded.recompute_blocks("all but attention")
    torch.testing.assert_close(rounded.gradient(2, rounded.checkpointed).double(), gradient, **limit)


def test_a_run_on_a_base_in_4_bits_exports_the_base_as_it_was_loaded(make_pipe, make_args, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "model"
    make_pipe().save_pretrained(folder)
    runs = [make_args(model=str(folder), output_dir=str(tmp_path / f"{n}"), base_bits=n) for n in (None, 4)]
    for args in runs:
        RewardGradientTrainer(None, redness, args, PROMPTS).train()
    whole, rounded = map(adapter, runs)
    assert 0.9 < F.cosine_similarity(whole, rounded, 0) < 0.99999
    main([runs[1].output_dir, "--merged", str(tmp_path / "merged")])
    base, merged = load_transformer(folder).state_dict(), load_transformer(tmp_path / "merged").state_dict()
    lora = read_lora(f"{runs[1].output_dir}/adapter", linear_sizes(model_sizes(folder)["transformer"])).layers
    for name, weight in base.items():
        layer = lora.get(name.removesuffix(".weight"))
        torch.testing.assert_close(merged[name], layer.merge(weight) if layer else weight, rtol=1e-6, atol=1e-6)


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
