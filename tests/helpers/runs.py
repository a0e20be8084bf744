"""Whole runs of the tiny pipeline, and what they leave."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_pipeline
from toy_rewards import PROMPTS, redness, rows_without_cost
from transformers import TrainerCallback

from rlhf.trainer import RewardGradientTrainer


def train(args, rewards=redness, pipe=None, evaluate=False, **kwargs) -> dict:
    evaluated = PROMPTS if evaluate else None
    return RewardGradientTrainer(pipe or tiny_pipeline(), rewards, args, PROMPTS, evaluated, **kwargs).train()


def saved_adapter(args, folder="adapter") -> dict[str, torch.Tensor]:
    return load_file(Path(args.output_dir) / folder / "pytorch_lora_weights.safetensors")


def adapter(args, folder="adapter") -> torch.Tensor:
    """All of a saved adapter as one vector."""
    tensors = saved_adapter(args, folder)
    return torch.cat([tensor.flatten() for _, tensor in sorted(tensors.items())])


def assert_same_training(a, b):
    for row, other in zip(rows_without_cost(a), rows_without_cost(b), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)  # a gain is a small difference
    for name, tensor in saved_adapter(a).items():
        torch.testing.assert_close(tensor, saved_adapter(b)[name], rtol=1e-3, atol=2e-5)


class OneProcess:
    """The `Layout` of a process that is alone."""

    num_processes, process_index, is_main_process, in_step = 1, 0, True, False
    device = torch.device("cpu")

    def reduce(self, tensor, how):
        return tensor


class At(TrainerCallback):
    """Does something after one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(control)
