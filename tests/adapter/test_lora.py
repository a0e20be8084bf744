"""The adapter: deterministic, no effect at first, float32 whatever the base, read by diffusers."""

import adapted_model
import pytest
import torch
from adapted_model import arguments
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import tiny_pipeline, tiny_transformer
from tiny_wan import tiny_wan_transformer

from rlhf.adapter.lora import ATTENTION, add_adapter, disable_adapter, lora_config
from rlhf.adapter.lora_weights import ADAPTER_FILE
from rlhf.adapter.masters import MasterWeights
from rlhf.config import RewardGradientConfig
from rlhf.export import export_merged
from rlhf.generator.loading import load_pipeline

INPUTS = arguments(torch.float32, batch=1)


def velocity(transformer) -> torch.Tensor:
    return adapted_model.velocity(transformer, INPUTS)


def shaken(transformer, amount=0.3, config=None, **settings) -> MasterWeights:
    """Add an adapter that does something."""
    add_adapter(transformer, config or lora_config(RewardGradientConfig(**{"lora_rank": 4} | settings)), seed=0)
    masters = MasterWeights(transformer)
    noise = torch.randn(masters.vector.shape, generator=torch.Generator().manual_seed(1))
    masters.set(masters.vector.detach() + amount * noise)
    return masters


def test_a_fresh_adapter_changes_nothing_and_comes_from_its_seed():
    base, adapted, again, other = (tiny_transformer() for _ in range(4))
    for transformer, seed in ((adapted, 0), (again, 0), (other, 1)):
        torch.rand(3)  # the global generator has no say
        before = torch.get_rng_state()
        add_adapter(transformer, lora_config(RewardGradientConfig(lora_rank=4)), seed)
        assert torch.equal(torch.get_rng_state(), before), "nor does it hear of the seed"
    assert torch.equal(velocity(base), velocity(adapted))
    assert torch.equal(MasterWeights(adapted).vector, MasterWeights(again).vector)
    assert not torch.allclose(MasterWeights(adapted).vector, MasterWeights(other).vector)


def test_only_the_adapter_is_trainable_and_all_eight_projections_have_one():
    transformer = tiny_transformer().requires_grad_(True)
    add_adapter(transformer, lora_config(RewardGradientConfig(lora_rank=4, lora_alpha=8)), 0)
    names = MasterWeights(transformer).names
    assert all("lora_" in name for name in names)
    assert len(names) == 2 * (8 + 7)  # the last block has no output for the text
    assert transformer.peft_config["default"].lora_alpha == 8


def test_adapter_off_is_the_base_and_on_again_afterwards():
    base, transformer = tiny_transformer(), tiny_transformer()
    shaken(transformer)
    tuned = velocity(transformer)
    with disable_adapter(transformer):
        assert torch.equal(velocity(transformer), velocity(base))
    assert torch.equal(velocity(transformer), tuned)
    assert not torch.allclose(tuned, velocity(base), atol=1e-3)
    assert all(p.requires_grad for n, p in transformer.named_parameters() if "lora_" in n)


def test_masters_of_a_bfloat16_base_keep_steps_that_bfloat16_would_lose():
    transformer = tiny_transformer().to(torch.bfloat16)
    add_adapter(transformer, lora_config(RewardGradientConfig(lora_rank=4)), 0)
    masters = MasterWeights(transformer)
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
    masters = shaken(tuned.transformer, lora_alpha=alpha)
    masters.save_adapter(tmp_path / ADAPTER_FILE)
    fresh.load_lora_weights(tmp_path)
    torch.testing.assert_close(velocity(fresh.transformer), velocity(tuned.transformer), rtol=1e-5, atol=1e-6)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.") and tensor.dtype == torch.float32 for name, tensor in saved.items())


def test_a_transformer_without_an_adapter_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter, expected an adapter"):
        MasterWeights(tiny_transformer())


@pytest.mark.parametrize("rank", [1, 8])
def test_an_adapter_of_another_rank_is_not_loaded(rank):
    """Not even one of rank 1, which would fit any other by repetition."""
    saved, masters = (shaken(tiny_transformer(), lora_rank=r) for r in (rank, 4))
    before = masters.vector.detach().clone()
    with pytest.raises(ValueError, match=r"lora_A.*: got .* expected \(4, .*go on with the adapter that was saved"):
        masters.load(masters.vector, saved.named(saved.vector))
    assert torch.equal(masters.vector, before)


# ---------------------------------------- DoRA, patterns, the average

EVERYTHING = LoraConfig(
    r=4,
    lora_alpha=4,
    target_modules=ATTENTION,
    use_dora=True,
    rank_pattern={"to_q": 2},
    alpha_pattern={"to_q": 6},
)


def with_dora():
    """Return a pipeline with everything that can be trained, and its masters."""
    pipe = tiny_pipeline()
    return pipe, shaken(pipe.transformer, 0.05, EVERYTHING)


def test_rank_and_alpha_patterns_and_magnitudes_are_as_asked():
    pipe, masters = with_dora()
    shapes = {name: tensor.shape for name, tensor in masters.named(masters.vector).items()}
    again = torch.zeros_like(masters.vector, requires_grad=False)
    masters.load(again, masters.named(masters.vector))
    assert torch.equal(again, masters.vector)
    assert shapes["transformer_blocks.0.attn.to_q.lora_A.default.weight"][0] == 2
    assert shapes["transformer_blocks.0.attn.to_k.lora_A.default.weight"][0] == 4
    attention = pipe.transformer.transformer_blocks[0].attn
    assert (attention.to_q.scaling["default"], attention.to_k.scaling["default"]) == (3.0, 1.0)
    assert shapes["transformer_blocks.0.attn.to_q.lora_magnitude_vector.default.weight"] == (32,)


def test_adapter_off_is_the_base_with_dora_too():
    pipe, masters = with_dora()
    tuned, base = velocity(pipe.transformer), velocity(tiny_transformer())
    assert not torch.allclose(tuned, base, atol=1e-2)
    with disable_adapter(pipe.transformer):
        assert torch.equal(velocity(pipe.transformer), base)
    assert torch.equal(velocity(pipe.transformer), tuned)
    assert torch.equal(disable_adapter(pipe.transformer)(velocity)(pipe.transformer), base)


def test_what_was_trained_is_merged_into_a_plain_checkpoint(tmp_path):
    pipe, masters = with_dora()
    tiny_pipeline().save_pretrained(tmp_path / "base")
    masters.save_adapter(tmp_path / "run" / "adapter" / ADAPTER_FILE)
    (tmp_path / "run" / "config.yaml").write_text(f"model: {tmp_path / 'base'}")
    export_merged(tmp_path / "run", tmp_path / "out")
    merged = load_pipeline(str(tmp_path / "out"))
    torch.testing.assert_close(velocity(merged.transformer), velocity(pipe.transformer), rtol=1e-3, atol=1e-4)


def test_the_layers_that_settings_name_are_adapted():
    transformer = tiny_transformer()
    add_adapter(transformer, lora_config(RewardGradientConfig(lora_target_modules=["to_q", "ff.net.2"])), 0)
    adapted = {name.split(".lora_")[0] for name in MasterWeights(transformer).names}
    assert {name.split(".", 2)[2] for name in adapted} == {"attn.to_q", "ff.net.2"}


def test_the_average_follows_the_vector_and_stands_in_for_it():
    transformer = tiny_transformer()
    add_adapter(transformer, lora_config(RewardGradientConfig(lora_rank=4)), 0)
    masters = MasterWeights(transformer, average_decay=0.9)
    expected, values = masters.vector.detach().clone(), []
    for update in range(200):
        with torch.no_grad():
            masters.vector += 0.01
        masters.update_averages(update)
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * masters.vector.detach()
        values.append((masters.vector - masters.average).mean().item())
        torch.testing.assert_close(masters.average, expected)
    assert values[-1] == pytest.approx(0.01 * 0.9 / 0.1, rel=1e-3)  # the lag behind a steady drift
    masters.write()
    current = masters.vector.detach().clone()
    with masters.use(masters.average):
        assert torch.equal(masters.vector.detach(), masters.average)
        assert torch.equal(masters.params[0].flatten(), masters.average[: masters.params[0].numel()])
    assert torch.equal(masters.vector.detach(), current)
    assert torch.equal(masters.params[0].flatten(), current[: masters.params[0].numel()])


@pytest.mark.parametrize("layers", [None, ["attention"], ["all-linear"]])
@pytest.mark.parametrize("make_transformer", [tiny_transformer, tiny_wan_transformer])
def test_a_set_of_layers_is_what_it_names(make_transformer, layers):
    """All linear layers of the blocks, or those of attention, by default; of either generator."""
    transformer = make_transformer()
    blocks = next(module for name, module in transformer.named_children() if name.endswith("blocks"))
    linear = {name for name, m in blocks.named_modules() if isinstance(m, torch.nn.Linear) and "norm" not in name}
    add_adapter(transformer, lora_config(RewardGradientConfig(lora_target_modules=layers)), seed=0)
    adapted = {name for name, m in blocks.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {name for name in linear if layers == ["all-linear"] or ".ff" not in name}


def test_an_adapters_description_stays_as_it_was_written(tiny_transformer):
    """The next run of a notebook is given the same object."""
    config = LoraConfig(r=2, target_modules="all-linear")
    add_adapter(tiny_transformer, config, seed=0)
    assert config.target_modules == "all-linear"
    assert len(tiny_transformer.peft_config["default"].target_modules) > 5
