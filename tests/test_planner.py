"""What the dry run prints is computed, and right."""

from tiny import tiny_pipeline

from rlhf.checks import model_card, with_sampling
from rlhf.config import RewardGradientConfig
from rlhf.lora import Masters, add_adapter, lora_config
from rlhf.planner import count_parameters, describe, sizes


def test_counts_are_those_of_the_real_modules():
    pipe = tiny_pipeline()
    card = model_card("", pipe)
    expected = [sum(p.numel() for p in module.parameters()) for module in (pipe.transformer, pipe.vae)]
    add_adapter(pipe.transformer, lora_config(RewardGradientConfig(lora_rank=4)), 0)
    args = RewardGradientConfig(lora_rank=4)
    assert count_parameters(args, card) == (*expected, Masters(pipe.transformer).vector.numel())
    assert "(16, 3, 4, 6)" in sizes(with_sampling(args, card["sampling"]), card)


def test_contentv_8b_is_described_without_weights():
    text = describe(RewardGradientConfig(model="ByteDance/ContentV-8B", num_grad_steps=5))
    for fact in ("8,056,627,520 parameters, 15.01 GiB", "41,472", "num_inference_steps: 50", "(16, 32, 54, 96)"):
        assert fact in text
    assert "not measured" in text
