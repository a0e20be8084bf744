"""`method: auto`: the gradient where all trained rewards have one, else scores alone."""

import re
from pathlib import Path

import pytest
import yaml
from runs import adapter, train
from toy_rewards import brightness, count, redness

from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.planner.text import plan_report

SHORT = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-2}
GROUPS = SHORT | {"method_kwargs": {"group_size": 2}, "per_device_train_batch_size": 2}


def written(args) -> str:
    return yaml.safe_load((Path(args.output_dir) / "config.yaml").read_text())["method"]


@pytest.mark.parametrize(
    ("rewards", "weights", "method", "reason"),
    [
        ([redness, brightness], [1, 1], "draft_k", "all trained rewards have a gradient"),
        ([redness, count], [1, 0], "draft_k", "all trained rewards have a gradient"),
        ([redness, count], [1, 1], "nft", "no gradient of count"),
    ],
)
def test_auto_is_the_method_that_it_becomes_and_says_so(make_args, tmp_path, capsys, rewards, weights, method, reason):
    settings = (GROUPS if method == "nft" else SHORT) | {"reward_weights": weights}
    auto, named = (make_args(output_dir=str(tmp_path / name), method=name, **settings) for name in ("auto", method))
    train(auto, rewards)
    assert f"method: {method}, chosen by auto: {reason}" in capsys.readouterr().out
    assert written(auto) == method
    train(named, rewards)
    assert adapter(auto).equal(adapter(named))


def test_a_resumed_run_keeps_what_was_chosen(make_args, tmp_path):
    first = make_args(output_dir=str(tmp_path / "first"), method="auto", **GROUPS)
    train(first, count)
    checkpoint = str(tmp_path / "first" / "checkpoints" / "step-1")
    again = make_args(output_dir=str(tmp_path / "again"), method="auto", resume_from_checkpoint=checkpoint, **GROUPS)
    train(again, redness)  # which has a gradient
    assert written(again) == "nft"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_grad_steps": 2}, "num_grad_steps: got 2 with method nft"),
        ({"per_device_train_batch_size": 3}, "per_device_train_batch_size: got 3 with method nft"),
        ({"drift_weight": 1.0}, "drift_weight: got 1.0 with method nft"),
        ({"prefix_steps": 1}, "prefix_steps: got it with method nft"),
    ],
)
def test_settings_that_do_not_fit_the_choice_are_refused_with_its_reason(make_args, settings, said):
    args = make_args(method="auto", **{"per_device_train_batch_size": 8} | settings)
    with pytest.raises(ConfigError, match=re.escape(said) + r".* \(method auto chose nft: no gradient of count\)"):
        train(args, count)
    assert not Path(args.output_dir).exists()


def test_options_of_the_other_choice_are_refused(make_args):
    args = make_args(method="auto", **GROUPS)
    with pytest.raises(ConfigError, match=r"got group_size with method draft_k.* \(method auto chose draft_k: all"):
        train(args, redness)


def test_a_dry_run_asks_for_the_method():
    with pytest.raises(ConfigError, match="method: got auto in a dry run"):
        plan_report(RewardGradientConfig(method="auto"))
