"""The copy that samples: float8 is near the adapted model, and the first model is left alone."""

import pytest
import torch
from adapted_model import arguments, gradients, model_with_adapter, velocity
from peft import LoraConfig
from tiny import tiny_transformer

from rlhf.adapter import float8
from rlhf.adapter.float8 import Float8Copy, Float8Linear, to_float8
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.execution.blocks import BlockRunner
from rlhf.training.setup import find_base

NUM_ROUNDED = 2 * 8 - 1 + 2 * 4 - 2  # of two blocks; the last has no projection and no layers after the text


@pytest.fixture(params=[torch.float8_e4m3fn, torch.float16])
def rounding(request, monkeypatch):
    """Return the largest relative error of a velocity; float16 stands for a finer format."""
    scaled_mm = lambda a, b, scale_a, scale_b, out_dtype: (a.float() * scale_a @ (b.float() * scale_b)).to(out_dtype)
    monkeypatch.setattr(float8, "FLOAT8", request.param)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    return {torch.float8_e4m3fn: 0.1, torch.float16: 1e-3}[request.param]


def distance(found, expected):
    return (found - expected).norm() / expected.norm()


@pytest.mark.parametrize("run_block", [None, BlockRunner()])
def test_the_copy_has_the_numbers_of_the_adapted_model_but_for_rounding(rounding, run_block):
    model, inputs = model_with_adapter(torch.float32), arguments(torch.float32)
    model.run_block = run_block
    copied, expected = Float8Copy(model), velocity(model, inputs)
    assert rounding / 100 < distance(velocity(copied.model, inputs), expected) < rounding
    assert distance(velocity(tiny_transformer(), inputs), expected) > 0.02
    rounded = [name for name, m in copied.model.named_modules() if isinstance(m, Float8Linear)]
    assert len(rounded) == len(copied.layers) == NUM_ROUNDED
    assert all(name.startswith("transformer_blocks") and ".norm" not in name for name in rounded)
    assert not any("lora" in name for name, _ in copied.model.named_modules())
    assert copied.model.run_block is run_block


def test_refresh_follows_the_adapter_and_the_base_stays_pristine(rounding):
    model, inputs = model_with_adapter(torch.float32), arguments(torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    copied = Float8Copy(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    places = [layer.weight.data_ptr() for layer, _ in copied.layers]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p *= -8
    assert distance(velocity(copied.model, inputs), velocity(model, inputs)) > 2 * rounding
    copied.refresh()
    assert distance(velocity(copied.model, inputs), velocity(model, inputs)) < rounding
    assert [layer.weight.data_ptr() for layer, _ in copied.layers] == places, "compiled code and graphs stay valid"


@pytest.mark.usefixtures("rounding")
def test_all_but_the_rounded_layers_are_shared_and_training_is_not_disturbed():
    model, inputs = model_with_adapter(torch.float32), arguments(torch.float32)
    expected = gradients(model, inputs)
    copied = Float8Copy(model)
    velocity(copied.model, inputs)
    own = {p.data_ptr() for p in model.parameters()}
    added = sum(t.numel() for t in copied.model.state_dict().values() if t.data_ptr() not in own)
    assert added == sum(layer.weight.numel() + layer.scale.numel() for layer, _ in copied.layers)
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(model, inputs).items())


def test_an_adapted_layer_of_another_size_follows_the_adapter_as_it_is(rounding):
    """Nothing is merged there: the copy's layer has the trained layer's tensors."""
    model, inputs = tiny_transformer(out_channels=3), arguments(torch.float32)
    model.add_adapter(LoraConfig(r=2, target_modules=["proj_out"], init_lora_weights=False))
    copied = Float8Copy(model)
    with torch.no_grad():
        model.proj_out.lora_B["default"].weight *= 2
    assert distance(velocity(copied.model, inputs), velocity(model, inputs)) < rounding
    assert copied.model.proj_out.lora_B["default"].weight is model.proj_out.lora_B["default"].weight


def test_the_processor_multiplies_in_float8_itself():
    try:
        float8.require_float8(torch.device("cpu"))
    except ConfigError as error:
        pytest.skip(str(error))
    model, inputs = model_with_adapter(torch.float32), arguments(torch.float32)
    assert 1e-3 < distance(velocity(Float8Copy(model).model, inputs), velocity(model, inputs)) < 0.1


def test_float8_rows_have_a_scale_each():
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 1e3, 0, 7])[:, None]
    rounded, scale = to_float8(x)
    assert rounded.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(rounded.float() * scale, x, rtol=0.07, atol=1e-5)


def test_a_device_without_float8_is_refused(monkeypatch):
    def missing(*_, **__):
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(torch, "_scaled_mm", missing)
    with pytest.raises(ValueError, match=r"got float8 on cpu, which has no float8 products \(no kernel\)"):
        Float8Copy(model_with_adapter(torch.float32))
    monkeypatch.setattr("rlhf.training.setup.Checkpoint.find", lambda *_, **__: pytest.fail("loaded weights"))
    with pytest.raises(ConfigError, match="use a device that has them, or sampling_weights own"):
        find_base(RewardGradientConfig(sampling_weights="float8"), torch.device("cpu"))


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("kind", ["use_dora", "lora_bias"])
def test_an_adapter_that_cannot_be_merged_is_refused(kind):
    model = tiny_transformer()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], **{kind: True}))
    with pytest.raises(ConfigError, match="got float8 with an adapter .*, expected plain LoRA; use sampling_weights"):
        Float8Copy(model)
