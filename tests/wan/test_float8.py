"""The float8 copy of Wan rounds the blocks' layers, and follows the adapter."""

import pytest
import torch
from tiny_wan import tiny_wan_conditioning, tiny_wan_transformer

from rlhf.adapter import float8
from rlhf.adapter.float8 import Float8Copy
from rlhf.adapter.lora import add_adapter, lora_config
from rlhf.config import RewardGradientConfig
from rlhf.generator.flow import guided_velocity


@pytest.mark.parametrize(("format", "error"), [(torch.float8_e4m3fn, 0.1), (torch.float16, 2e-3)])
def test_the_copy_has_the_numbers_of_the_adapted_model_but_for_rounding(monkeypatch, format, error):
    scaled_mm = lambda a, b, scale_a, scale_b, out_dtype: (a.float() * scale_a @ (b.float() * scale_b)).to(out_dtype)
    monkeypatch.setattr(float8, "FLOAT8", format)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    model = tiny_wan_transformer(attention_head_dim=24, ffn_dim=64)  # sizes that float8 takes
    add_adapter(model, lora_config(RewardGradientConfig(lora_rank=2)), seed=0)
    x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    velocity = lambda m: guided_velocity(m, x, torch.tensor(0.5), tiny_wan_conditioning(), 3.0).detach()
    base, copied = velocity(model), Float8Copy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p += 1.0
    copied.refresh()
    expected = velocity(model)
    assert (base - expected).norm() > 0.1 * expected.norm()
    assert error / 1000 < (velocity(copied.model) - expected).norm() / expected.norm() < error
    assert len(copied.layers) == 2 * 10  # of two blocks: two attentions, and the feed-forward layer
