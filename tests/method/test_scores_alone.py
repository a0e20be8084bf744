"""Runs of the methods that learn from scores alone."""

import pytest
import torch
from runs import adapter, train
from toy_rewards import count, rows_without_cost

OPTIONS = {"nft": {"num_levels": 2}, "flow_grpo": {"kl_weight": 0.04}}
both = pytest.mark.parametrize("method", OPTIONS)


@both
def test_a_reward_without_gradient_rises(make_args, method):
    options = {"group_size": 8} | ({"num_levels": 3} if method == "nft" else {})
    many = {"per_device_train_batch_size": 16, "method_kwargs": options}
    args = make_args(max_steps=20, learning_rate=5e-2, method=method, **many)
    train(args, count)
    rewards = [row["reward"] for row in rows_without_cost(args)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 2


@both
def test_accumulated_batches_and_a_resumed_run_equal_one_run(make_pipe, make_args, tmp_path, method):
    settings = {"method": method, "method_kwargs": OPTIONS[method] | {"group_size": 2}, "adam_epsilon": 1e-4}
    settings |= {"max_steps": 2, "learning_rate": 1e-2, "save_steps": 1}
    many = make_args(output_dir=str(tmp_path / "many"), gradient_accumulation_steps=2, **settings)
    settings |= {"per_device_train_batch_size": 4}
    one = make_args(output_dir=str(tmp_path / "one"), **settings)
    for args in (many, one):
        train(args, count, pipe=make_pipe())
    for row, other in zip(rows_without_cost(many), rows_without_cost(one), strict=True):
        assert row.pop("saturated") == pytest.approx(other.pop("saturated"), abs=4e-5)  # a pixel of 30,720
        assert row == pytest.approx(other, rel=1e-4)
    whole, checkpoint = adapter(one), str(tmp_path / "one" / "checkpoints" / "step-1")
    again = make_args(output_dir=str(tmp_path / "again"), resume_from_checkpoint=checkpoint, **settings)
    train(again, count, pipe=make_pipe())
    assert torch.equal(adapter(again), whole)
