"""AdamW on the masters: its settings, its learning rate, the limit of its gradient."""

import math
import re
from pathlib import Path

import pytest
import torch
from runs import saved_adapter, train
from tiny import tiny_pipeline
from toy_rewards import PROMPTS, redness

from rlhf.adapter.optimizer import clip_gradient, learning_rate, slow_updates
from rlhf.config import RewardGradientConfig
from rlhf.run.metrics import read_metrics
from rlhf.trainer import RewardGradientTrainer


def test_settings_of_the_optimizer_reach_it(make_args):
    args = make_args(weight_decay=0.3, adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-3)
    (group,) = RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS).optimizer.param_groups
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.3, (0.5, 0.6), 1e-3)


def test_a_long_gradient_is_scaled_down_to_the_limit(make_args, tmp_path):
    """By AdamW with a large epsilon, the first step is close to proportional to the gradient."""
    moved = []
    for limit in (0.0, 1e-3):
        args = make_args(output_dir=str(tmp_path / str(limit)), max_grad_norm=limit, adam_epsilon=1.0, max_steps=1)
        train(args)
        b = [tensor.flatten() for name, tensor in saved_adapter(args).items() if "lora_B" in name]
        moved.append(torch.cat(b).norm().item())
        norm = read_metrics(Path(args.output_dir))[0]["grad_norm"]
    assert norm > 2e-3, "the norm is logged as it was before clipping"
    assert moved[0] / moved[1] == pytest.approx(norm / 1e-3, rel=0.1)


def test_updates_far_below_the_learning_rate_are_said_at_the_start(make_args, capsys):
    args = make_args(max_grad_norm=1e-9, learning_rate=1e-2, warmup_steps=2, max_steps=1)
    train(args)
    told = capsys.readouterr().out
    peak = read_metrics(Path(args.output_dir))[-1]["learning_rate"]
    assert peak == pytest.approx(0.5e-2)
    assert "warmup_steps=2 is not below max_steps=1: the learning rate rises in every step, up to 0.5 of" in told
    share, numbers = (float(found) for found in re.search(r"over (\d+) .* by (\S+) of", told).groups()[::-1])
    b = torch.cat([tensor.flatten() for name, tensor in saved_adapter(args).items() if "lora_B" in name])
    assert b.norm() / peak == pytest.approx(share * numbers**0.5, rel=0.1)
    assert [*slow_updates(make_args(), 10**6), *slow_updates(make_args(max_grad_norm=0.0), 10**6)] == []
    assert [*slow_updates(make_args(learning_rate=0.0), 10**6)] == ["learning_rate=0: no weight moves"]


def test_terms_of_every_nth_step_that_no_step_has_are_said_at_the_start(make_args, capsys):
    train(make_args(anchor_steps=3, max_steps=2, eval_steps=2))
    told = capsys.readouterr().out
    assert "anchor_steps=3 is above max_steps=2: no step of the run is one of them" in told
    assert "eval_steps=2 is above" not in told


def test_a_short_gradient_is_left_as_it_is():
    gradient = torch.tensor([0.3, -0.4])
    clip_gradient(gradient, norm=0.5, limit=1.0)
    assert gradient.tolist() == pytest.approx([0.3, -0.4])


def test_learning_rate_warms_up_then_stays_or_falls():
    args = RewardGradientConfig(learning_rate=1.0, warmup_steps=4, max_steps=10)
    assert [learning_rate(step, args) for step in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    args.lr_scheduler_type = "linear"
    assert [learning_rate(step, args) for step in (0, 3, 4, 7, 9)] == pytest.approx([0.25, 1.0, 1.0, 0.5, 1 / 6])
    args.lr_scheduler_type = "cosine"
    halves = [0.25, 1.0, 1.0, 0.5, (1 - math.cos(math.pi / 6)) / 2]  # after the warm-up 3 of 6 steps, 5 of 6
    assert [learning_rate(step, args) for step in (0, 3, 4, 7, 9)] == pytest.approx(halves)
    args.lr_scheduler_type = "linear"
    args.warmup_steps = 0
    assert learning_rate(0, args) == 1.0
    args.warmup_steps = 10
    assert learning_rate(9, args) == 1.0, "nothing is left to fall"
