"""Adjoint matching: its gradient, its fixed point in closed form, and the base's adjoint."""

import pytest
import torch
from tiny import tiny_pipeline
from toy_rewards import PROMPTS, redness

from rlhf.trainer import RewardGradientTrainer


def first_update(make_args, **settings) -> torch.Tensor:
    """The gradient of a first step, at an adapter that changes nothing yet."""
    trainer = RewardGradientTrainer(tiny_pipeline(), redness, make_args(**settings), PROMPTS)
    gradient = []
    trainer._update = lambda step, norm: gradient.append(trainer.masters.vector.grad.clone())
    trainer.step(0)
    return gradient[0]


@pytest.mark.parametrize(
    ("steps", "speed"), [(3, {}), (2, {"gradient_checkpointing": True, "stepwise_backward": True})]
)
def test_at_the_base_the_gradient_is_that_of_the_last_steps_whatever_the_scale(make_args, steps, speed):
    options = {"adjoint_steps": steps, "reward_scale": 7.0}
    matched = first_update(make_args, method="adjoint_matching", method_kwargs=options, **speed)
    exact = first_update(make_args, num_grad_steps=steps)
    torch.testing.assert_close(matched, exact, rtol=1e-3, atol=1e-5 * exact.abs().max().item())
    other = first_update(make_args, num_grad_steps=1)
    assert (other - exact).norm() > 0.05 * exact.norm(), "more steps have to matter"
