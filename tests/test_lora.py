"""The adapter: deterministic, without effect at first, in float32 whatever the base, and read back by diffusers."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_conditioning, tiny_pipeline, tiny_transformer

from rlhf.config import RewardGradientConfig
from rlhf.lora import Masters, adapter_off, add_adapter, lora_config, save_adapter

LATENTS = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def velocity(transformer) -> torch.Tensor:
    cond = tiny_conditioning()
    with torch.no_grad():
        return transformer(
            LATENTS, cond.prompt_embeds_BLD, cond.pooled_embeds_BP, torch.tensor([500.0]), return_dict=False
        )[0]


def shaken(transformer, config=None, amount=0.3) -> Masters:
    """An adapter that does something."""
    add_adapter(transformer, config or lora_config(RewardGradientConfig(lora_rank=4)), seed=0)
    masters = Masters(transformer)
    with torch.no_grad():
        noise = torch.randn(masters.vector.shape, generator=torch.Generator().manual_seed(1))
        masters.vector += amount * noise
    masters.write()
    return masters


def test_a_fresh_adapter_changes_nothing_and_comes_from_its_seed():
    base, adapted, again, other = (tiny_transformer() for _ in range(4))
    for transformer, seed in ((adapted, 0), (again, 0), (other, 1)):
        torch.rand(3)  # the global generator has no say
        add_adapter(transformer, lora_config(RewardGradientConfig(lora_rank=4)), seed)
    assert torch.equal(velocity(base), velocity(adapted))
    assert torch.equal(Masters(adapted).vector, Masters(again).vector)
    assert not torch.allclose(Masters(adapted).vector, Masters(other).vector)


def test_only_the_adapter_is_trainable_and_all_eight_projections_have_one():
    transformer = tiny_transformer()
    add_adapter(transformer, lora_config(RewardGradientConfig(lora_rank=4, lora_alpha=8)), 0)
    names = Masters(transformer).names
    assert all("lora_" in name for name in names)
    assert len(names) == 2 * (8 + 7)  # the last block has no output for the text
    assert transformer.peft_config["default"].lora_alpha == 8


def test_adapter_off_is_the_base_and_on_again_afterwards():
    base, transformer = tiny_transformer(), tiny_transformer()
    masters = shaken(transformer)
    tuned = velocity(transformer)
    with adapter_off(transformer, masters):
        assert torch.equal(velocity(transformer), velocity(base))
    assert torch.equal(velocity(transformer), tuned)
    assert not torch.allclose(tuned, velocity(base), atol=1e-3)
    assert all(p.requires_grad for n, p in transformer.named_parameters() if "lora_" in n)


def test_masters_of_a_bfloat16_base_keep_steps_that_bfloat16_would_lose():
    transformer = tiny_transformer().to(torch.bfloat16)
    add_adapter(transformer, lora_config(RewardGradientConfig(lora_rank=4)), 0)
    masters = Masters(transformer)
    assert masters.vector.dtype == torch.float32
    assert {p.dtype for p in masters.params} == {torch.bfloat16}
    with torch.no_grad():
        masters.vector.fill_(1.0)
        for _ in range(4):
            masters.vector += 1e-3  # bfloat16 has no number between 1 and 1.0078
    masters.write()
    assert masters.params[0].unique().item() == pytest.approx(1.0078125)


def test_gradients_of_several_passes_add_up_in_the_masters():
    transformer = tiny_transformer()
    masters = shaken(transformer)
    for factor in (1.0, 2.0):
        for p in masters.params[:2]:
            p.grad = torch.full_like(p, factor)
        assert masters.collect_grad() == 2
    pieces = list(masters.named(masters.vector.grad).values())
    assert pieces[0].unique().item() == pieces[1].unique().item() == 3.0
    assert pieces[2].abs().max() == 0
    assert masters.params[0].grad is None


@pytest.mark.parametrize("alpha", [4, 2])
def test_a_saved_adapter_loads_in_a_fresh_pipeline(tmp_path, alpha):
    tuned, fresh = tiny_pipeline(), tiny_pipeline()
    masters = shaken(tuned.transformer, lora_config(RewardGradientConfig(lora_rank=4, lora_alpha=alpha)))
    save_adapter(tuned, masters, tmp_path)
    fresh.load_lora_weights(tmp_path)
    torch.testing.assert_close(velocity(fresh.transformer), velocity(tuned.transformer), rtol=1e-5, atol=1e-6)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.") and tensor.dtype == torch.float32 for name, tensor in saved.items())


def test_a_transformer_without_an_adapter_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter, expected an adapter"):
        Masters(tiny_transformer())
