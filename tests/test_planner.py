"""What the dry run prints is computed, and right."""

import pytest
from conftest import PROMPTS, redness
from tiny import tiny_pipeline

from rlhf.checks import model_card, with_sampling
from rlhf.config import RewardGradientConfig
from rlhf.lora import Masters, add_adapter, lora_config
from rlhf.planner import count_parameters, describe, forwards, sizes
from rlhf.trainer import RewardGradientTrainer


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


@pytest.mark.parametrize(
    "settings",
    [
        {"num_grad_steps": 3},
        {"method": "draft_lv", "num_draws": 3},
        {"method": "srpo", "num_draws": 2, "drift_weight": 1.0},
        {"method": "listed", "grad_steps": [0, 2], "guidance_gradient": "text"},
        {"method": "drtune", "num_grad_steps": 2, "guidance_gradient": "none"},
        {"num_grad_steps": 2, "guidance_gradient": "distill", "drift_weight": 1.0},
        {"method": "refl", "jump_steps": 1, "guidance_scale": 1.0},
    ],
)
def test_forwards_are_those_that_a_training_step_makes(make_args, settings):
    pipe, args = tiny_pipeline(), make_args(per_device_train_batch_size=1, max_steps=1, **settings)
    trainer = RewardGradientTrainer(pipe, redness, args, PROMPTS)
    calls = []
    pipe.transformer.register_forward_hook(lambda module, inputs, output: calls.append(output[0].requires_grad))
    trainer._begin()
    trainer.step(0)
    assert (len(calls), sum(calls)) == forwards(trainer.args)
