"""The transformer equals a straight-line implementation and has the published keys."""

from functools import partial

import adapted_model
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models import normalization
from peft import LoraConfig
from straight_line import expected_shapes, position_table, transformer_forward
from tiny import tiny_transformer

from rlhf.contentv import transformer as module
from rlhf.contentv.transformer import MAX_CACHED_TABLES, QueryKeyNorm, SD3Transformer3DModel

LORA = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "add_k_proj", "to_out.0"])


arguments = partial(adapted_model.arguments, dtype=torch.float32, batch=1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 4, 6), (9, 4, 6), (1, 8, 2), (3, 2, 8)])
def test_forward_equals_straight_line(batch, frames, height, width):
    model = tiny_transformer()
    inputs = arguments(batch=batch, frames=frames, height=height, width=width)
    expected = transformer_forward(model.state_dict(), model.config, *inputs)
    torch.testing.assert_close(model(*inputs).sample, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1


def test_forward_equals_straight_line_with_other_sizes():
    model = tiny_transformer(
        in_channels=4, out_channels=3, patch_size=1, num_layers=3, num_attention_heads=3, joint_attention_dim=32
    )
    inputs = arguments(channels=4)
    expected = transformer_forward(model.state_dict(), model.config, *inputs)
    torch.testing.assert_close(model(*inputs, return_dict=False)[0], expected, atol=1e-5, rtol=1e-5)


def test_contentv_8b_has_the_published_keys_and_shapes():
    with torch.device("meta"):
        model = SD3Transformer3DModel()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == expected_shapes(model.config)
    assert sum(p.numel() for p in model.parameters()) == 8_056_627_520
    assert shapes["transformer_blocks.37.norm1_context.linear.weight"] == (2 * 2432, 2432)
    assert not any(name for name, _ in model.named_buffers())


def test_state_dict_loads_strictly_both_ways():
    model, other = tiny_transformer(0), tiny_transformer(1)
    published = {key: torch.randn(shape) for key, shape in expected_shapes(model.config).items()}
    model.load_state_dict(published, strict=True)
    other.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in published.items())


def test_config_survives_saving(tmp_path):
    model = tiny_transformer(num_layers=1, joint_attention_dim=48, pooled_projection_dim=20)
    model(torch.zeros(1, 16, 2, 4, 6), torch.zeros(1, 3, 48), torch.zeros(1, 20), torch.ones(1))  # fills the cache
    model.save_pretrained(tmp_path)
    loaded = SD3Transformer3DModel.from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_config_of_the_stock_class_is_read_and_checked():
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32}
    stock = SD3Transformer2DModel(**sizes, pos_embed_max_size=192, qk_norm="rms_norm", sample_size=4)
    assert SD3Transformer3DModel.from_config(stock.config).config.num_layers == 1
    with pytest.raises(ValueError, match=r"qk_norm=None, expected 'rms_norm'"):
        SD3Transformer3DModel.from_config(SD3Transformer2DModel(**sizes, sample_size=4).config)


def test_width_must_fit_the_position_table():
    with pytest.raises(ValueError, match="multiple of 16"):
        SD3Transformer3DModel(num_layers=1, num_attention_heads=3, attention_head_dim=8)


def test_position_table_is_built_once_per_grid_and_dtype(monkeypatch):
    built = []
    original = module._sincos_table
    monkeypatch.setattr(module, "_sincos_table", lambda *a: built.append(a) or original(*a))
    model = tiny_transformer()
    for _ in range(3):
        model(*arguments())
    assert len(built) == 1
    model.double()(*arguments(dtype=torch.float64))
    assert len(built) == 2
    for frames in range(1, 6):
        model(*arguments(dtype=torch.float64, frames=frames))
    assert len(model.pos_embed._tables) == MAX_CACHED_TABLES


def test_position_table_is_exact_and_not_part_of_the_checkpoint():
    model = tiny_transformer()
    table = model.pos_embed.position_table((3, 2, 5), torch.zeros(1, 32, dtype=torch.float64))
    torch.testing.assert_close(table, position_table(3, 2, 5, 32), atol=1e-12, rtol=0)
    assert not any("table" in key for key in model.state_dict())


def test_position_table_built_while_sampling_serves_training():
    model = tiny_transformer().requires_grad_(True)
    with torch.inference_mode():
        model(*arguments())
    model(*arguments()).sample.sum().backward()
    assert model.pos_embed.proj.weight.grad.abs().sum() > 0


def gradients(model):
    model.zero_grad()
    model(*arguments(batch=2)).sample.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_gives_the_same_gradients():
    model = tiny_transformer()
    model.add_adapter(LORA)
    plain = gradients(model)
    calls = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.enable_gradient_checkpointing()
    checkpointed = gradients(model)
    assert len(calls) == 2  # once forward, once recomputed
    assert plain.keys() == checkpointed.keys()
    assert len(plain) > 8
    for name, grad in plain.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], grad, atol=1e-7, rtol=1e-5)


def test_lora_scale_is_applied_and_undone():
    model = tiny_transformer()
    base = model(*arguments()).sample
    model.add_adapter(LORA)
    full = model(*arguments()).sample
    none = model(*arguments(), joint_attention_kwargs={"scale": 0.0}).sample
    assert (full - base).abs().max() > 1e-2
    torch.testing.assert_close(none, base, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model(*arguments()).sample, full, atol=0, rtol=0)


def test_lora_scale_with_checkpointing_is_refused_only_for_gradients():
    model = tiny_transformer()
    model.add_adapter(LORA)
    model.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match=r"scale=0.5 .* expected no scale: .* disable gradient checkpointing"):
        model(*arguments(), joint_attention_kwargs={"scale": 0.5})
    with torch.no_grad():
        model(*arguments(), joint_attention_kwargs={"scale": 0.5})
    model(*arguments(), joint_attention_kwargs={"scale": 1.0})


@pytest.mark.parametrize("shape", [(1, 16, 4, 6), (1, 16, 2, 5, 6), (1, 16, 2, 4, 3)])
def test_latents_of_another_size_are_refused(shape):
    model = tiny_transformer()
    _, *rest = arguments()
    with pytest.raises(ValueError, match=r"expected \(batch, channels, frames, height, width\).*divisible by 16"):
        model(torch.zeros(shape), *rest)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "rounding"),
    [
        (torch.float32, torch.float32, 2**-22),
        (torch.bfloat16, torch.bfloat16, 2**-7),
        (torch.float32, torch.bfloat16, 2**-7),
    ],
)
def test_the_norm_of_queries_and_keys_is_that_of_diffusers_but_for_rounding(dtype, weight_dtype, rounding):
    ours, theirs = (cls(16, eps=1e-6).to(weight_dtype) for cls in (QueryKeyNorm, normalization.RMSNorm))
    weight = torch.randn(16, generator=torch.Generator().manual_seed(0))
    for norm in (ours, theirs):
        norm.weight.data.copy_(weight)
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert ours(x).dtype == theirs(x).dtype
    torch.testing.assert_close(ours(x), theirs(x), rtol=rounding, atol=0)
    square = x.double().square().mean(-1, keepdim=True)
    exact = x.double() * (square + 1e-6).rsqrt() * ours.weight.double()
    assert (ours(x) - exact).norm() <= (theirs(x) - exact).norm()


def test_the_norm_of_queries_and_keys_stays_in_float64():
    """The stock class squares in float32, which would spoil gradients that are to be exact."""
    norm, x = QueryKeyNorm(16, eps=1e-6).double(), torch.randn(3, 16, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected, atol=1e-14, rtol=1e-14)


def test_on_the_cpu_no_plug_in_is_asked_for_the_norm(monkeypatch):
    """The stock class calls an installed plug-in, which has no kernel for CPU tensors."""
    monkeypatch.setattr(normalization, "is_torch_npu_available", lambda: True)
    model = tiny_transformer()
    assert model(*arguments()).sample.isfinite().all()
