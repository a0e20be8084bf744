"""The copy that samples: float8 is near the adapted model, merging exact, and the first model is left alone."""

import pytest
import torch
from adapted_model import arguments, gradients, model_with_adapter
from float8 import needs_float8
from peft import LoraConfig
from tiny import tiny_transformer

from rlhf.adapter import sampling_copy
from rlhf.adapter.sampling_copy import Float8Linear, SamplingCopy, to_float8
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.execution.blocks import BlockRunner
from rlhf.training.setup import load_base


@pytest.fixture
def merging(monkeypatch):
    """Layers of sizes that float8 does not take, which are merged in the base's format."""
    monkeypatch.setattr(sampling_copy, "_fits", lambda layer: False)
    monkeypatch.setattr(sampling_copy, "require_float8", lambda device: None)


def velocity(model, inputs):
    with torch.no_grad():
        return model(*inputs).sample


@pytest.mark.usefixtures("merging")
@pytest.mark.parametrize("run_block", [None, BlockRunner()])
def test_the_merged_copy_has_the_numbers_of_the_adapted_model(run_block):
    model, inputs = model_with_adapter(torch.float32), arguments(torch.float32)
    model.run_block = run_block
    base = tiny_transformer()
    sampler = SamplingCopy(model)
    expected = velocity(model, inputs)
    assert (velocity(base, inputs) - expected).norm() > 0.02 * expected.norm()
    torch.testing.assert_close(velocity(sampler.model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in sampler.model.named_modules())
    assert sampler.model.run_block is run_block


@pytest.mark.usefixtures("merging")
def test_refresh_follows_the_adapter_and_the_base_stays_pristine():
    model, inputs = model_with_adapter(torch.float32), arguments(torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sampler = SamplingCopy(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    places = [layer.weight.data_ptr() for layer, _ in sampler.layers]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p *= -2
    stale = velocity(sampler.model, inputs)
    sampler.refresh()
    torch.testing.assert_close(velocity(sampler.model, inputs), velocity(model, inputs), rtol=1e-4, atol=1e-5)
    assert (stale - velocity(model, inputs)).norm() > 0.05 * stale.norm()
    assert [layer.weight.data_ptr() for layer, _ in sampler.layers] == places, "compiled code and graphs stay valid"


@pytest.mark.usefixtures("merging")
def test_all_but_the_merged_layers_are_shared():
    model = model_with_adapter(torch.float32)
    sampler = SamplingCopy(model)
    own = {p.data_ptr() for p in model.parameters()}
    copied = sum(t.numel() for t in sampler.model.state_dict().values() if t.data_ptr() not in own)
    assert copied == sum(layer.weight.numel() for layer, _ in sampler.layers)
    assert len(sampler.layers) == 8 * 2 - 1, "the last block has no projection of the text's result"


@pytest.mark.usefixtures("merging")
def test_training_the_first_model_is_not_disturbed():
    model, inputs = model_with_adapter(torch.float32), arguments(torch.float32)
    expected = gradients(model, inputs)
    sampler = SamplingCopy(model)
    velocity(sampler.model, inputs)
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(model, inputs).items())


@needs_float8
def test_float8_is_near_and_rounds_the_large_layers_of_the_blocks_alone():
    model, inputs = model_with_adapter(torch.float32), arguments(torch.float32)
    sampler, expected = SamplingCopy(model), velocity(model, inputs)
    difference = (velocity(sampler.model, inputs) - expected).norm() / expected.norm()
    assert 1e-3 < difference < 0.1
    rounded = [name for name, m in sampler.model.named_modules() if isinstance(m, Float8Linear)]
    assert len(rounded) == 2 * 8 - 1 + 2 * 4 - 2
    assert all(name.startswith("transformer_blocks") and ".norm" not in name for name in rounded)


def test_float8_rows_have_a_scale_each():
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 1e3, 0, 7])[:, None]
    rounded, scale = to_float8(x)
    assert rounded.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(rounded.float() * scale, x, rtol=0.07, atol=1e-5)


def test_a_device_without_float8_is_refused(monkeypatch):
    def missing(*_, **__):
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(sampling_copy.torch, "_scaled_mm", missing)
    with pytest.raises(ValueError, match=r"got float8 on cpu, which has no float8 products \(no kernel\)"):
        SamplingCopy(model_with_adapter(torch.float32))
    monkeypatch.setattr("rlhf.training.setup.load_pipeline", lambda *_, **__: pytest.fail("loaded weights"))
    with pytest.raises(ConfigError, match="use a device that has them, or sampling_weights own"):
        load_base(RewardGradientConfig(sampling_weights="float8"), torch.device("cpu"))


@pytest.mark.usefixtures("merging")
def test_an_adapter_that_cannot_be_merged_so_is_refused():
    for kind, told in (("use_dora", "DoRA adapter"), ("lora_bias", "an adapter with biases")):
        model = tiny_transformer()
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], **{kind: True}))
        with pytest.raises(ValueError, match=f"{told}, expected plain LoRA"):
            SamplingCopy(model)
