"""The optimizer of the masters: its settings, its learning rate, the limit of its gradient, its moments in few bits."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, redness
from runs import saved_adapter, train
from safetensors.torch import load_file
from tiny import tiny_pipeline

from rlhf.checkpoint import _fingerprint
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.optimizer import (
    EIGHT_BIT,
    OPTIMIZERS,
    clip_gradient,
    learning_rate,
    make_optimizer,
    missing_optimizer,
    moment_bytes,
)
from rlhf.tracking import read_metrics
from rlhf.trainer import RewardGradientTrainer


def test_settings_of_the_optimizer_reach_it(make_args):
    args = make_args(weight_decay=0.3, adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-3)
    (group,) = RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS).optimizer.param_groups
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.3, (0.5, 0.6), 1e-3)


def test_moments_of_8_bits_take_nearly_the_same_steps_and_a_quarter_of_the_memory():
    pytest.importorskip("bitsandbytes")
    ends, sizes, start = [], [], torch.linspace(-1, 1, 50_000)
    for name in OPTIMIZERS:
        vector = start.clone().requires_grad_()
        args = RewardGradientConfig(optim=name, learning_rate=1e-2, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9)
        optimizer, draw = make_optimizer(vector, args), torch.Generator().manual_seed(0)
        optimizer.param_groups[0]["lr"] = args.learning_rate
        for _ in range(8):
            vector.grad = start + 0.3 * torch.randn(start.shape, generator=draw)
            optimizer.step()
        ends.append(vector.detach() - start)
        kept = [t.nbytes for t in optimizer.state[vector].values() if torch.is_tensor(t)]
        assert sum(kept) == pytest.approx(len(start) * moment_bytes(args), rel=0.03)  # and two tables of 1 KiB
        sizes.append(sum(kept))
    assert 0.999 < torch.cosine_similarity(*ends, dim=0) < 1 - 1e-7
    assert sizes[1] < 0.27 * sizes[0]


def test_an_optimizer_that_is_not_installed_is_named_with_its_pip_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs bitsandbytes, which is not installed; pip install bitsandbytes" in missing_optimizer(EIGHT_BIT)
    assert missing_optimizer("adamw_torch_fused") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "bitsandbytes" or None)
    assert missing_optimizer(EIGHT_BIT) is None


def test_a_run_with_8_bits_trains_and_goes_on_as_if_never_stopped(make_args, tmp_path):
    pytest.importorskip("bitsandbytes")
    runs, blocks = {}, {"lora_rank": 16, "train_blocks": ["transformer_blocks.0"], "ema_decay": 0.5}
    for name, steps in (("whole", [4]), ("parted", [2, 4])):
        for last in steps:
            again = {"resume_from_checkpoint": "latest"} if last != steps[0] else {}
            args = make_args(output_dir=str(tmp_path / name), optim=EIGHT_BIT, max_steps=last, **blocks, **again)
            train(args)
        runs[name] = saved_adapter(args)
    assert all(torch.equal(runs["whole"][name], runs["parted"][name]) for name in runs["whole"])
    state = load_file(tmp_path / "parted" / "checkpoints" / "step-4" / "optimizer.safetensors")
    assert {"state1", "state2", "absmax1", "absmax2"} <= state.keys(), "the moments were kept in 8 bits"
    with pytest.raises(ConfigError, match="optim: got 'adamw_torch_fused', expected 'adamw_bnb_8bit'"):
        train(dataclasses.replace(args, optim=OPTIMIZERS[0], max_steps=6))


def test_a_run_from_before_the_setting_goes_on_with_the_moments_that_it_has(make_args):
    pytest.importorskip("bitsandbytes")
    args = make_args(lora_rank=16, max_steps=1)
    train(args)
    path = Path(args.output_dir) / "checkpoints" / "step-1"
    forget_setting(path, "optim")
    again = make_args(lora_rank=16, max_steps=2, resume_from_checkpoint=str(path))
    with pytest.raises(ConfigError, match="optim: got 'adamw_bnb_8bit', expected 'adamw_torch_fused'"):
        train(dataclasses.replace(again, optim=EIGHT_BIT))
    train(again)


def forget_setting(checkpoint: Path, name: str) -> None:
    """As a version without that setting wrote it."""
    state = json.loads((checkpoint / "state.json").read_text())
    del state["settings"][name]
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["state.json"] = _fingerprint(checkpoint / "state.json")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


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


def test_a_short_gradient_is_left_as_it_is():
    gradient = torch.tensor([0.3, -0.4])
    clip_gradient(gradient, norm=0.5, limit=1.0)
    assert gradient.tolist() == pytest.approx([0.3, -0.4])


def test_learning_rate_warms_up_then_stays_or_falls():
    args = RewardGradientConfig(learning_rate=1.0, warmup_steps=4, max_steps=10)
    assert [learning_rate(step, args) for step in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    args.lr_scheduler_type = "linear"
    assert [learning_rate(step, args) for step in (0, 3, 4, 7, 9)] == pytest.approx([0.25, 1.0, 1.0, 0.5, 1 / 6])
    args.warmup_steps = 0
    assert learning_rate(0, args) == 1.0
    args.warmup_steps = 10
    assert learning_rate(9, args) == 1.0, "nothing is left to fall"
