"""Explanations of memory that ends, by where it came, and of numbers that are not finite."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy_rewards import brightness

import rlhf
from rewards import RewardMix
from rewards.models.pixels import Flicker
from rlhf.training.failures import MEMORY_CURES, TrainingError, broken_rewards, non_finite_error, out_of_memory

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 24 GiB"


def caught(work) -> Exception:
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("it did not fail")


def fail(*_, **__):
    raise torch.OutOfMemoryError(FULL)


def test_a_machine_without_memory_is_recognised_and_other_errors_are_left_alone():
    told = out_of_memory(caught(lambda: torch.empty(2**60)))
    assert told.startswith("Out of memory: ")
    assert "gradient_checkpointing, stepwise_backward" in told
    for words in ("NPU out of memory. Tried to allocate", "not enough memory: you tried to allocate"):
        assert words in out_of_memory(RuntimeError(words))
    assert out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_cures_are_those_of_files_and_folders_that_there_are():
    root = Path(rlhf.__file__).parents[1]
    names = {path.name for path in (root / "rlhf").rglob("*.py")} | {"rewards", ""}
    assert set(MEMORY_CURES) <= names


def test_a_reward_is_named_with_its_own_cures(monkeypatch):
    reward = Flicker()
    monkeypatch.setattr(reward, "score", fail)
    told = out_of_memory(caught(lambda: reward(torch.rand(1, 3, 4, 8, 8), ["x"])))
    assert told.startswith(
        "Out of memory in rewards/models/pixels.py: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0"
    )
    assert MEMORY_CURES["rewards"] in told


def test_the_decoder_is_named_with_its_own_cures(tiny_pipe, monkeypatch):
    from rlhf.generator.wan_decoder import decode_video

    monkeypatch.setattr("rlhf.generator.wan_decoder._decode_chunk", fail)
    told = out_of_memory(caught(lambda: decode_video(tiny_pipe.vae, torch.zeros(1, 16, 2, 2, 4))))
    assert told.startswith("Out of memory in ")
    assert MEMORY_CURES["wan_decoder.py"] in told


def test_the_reward_behind_a_gradient_is_named_beside_others():
    def edge(video, prompts, **info):
        return (0 * brightness(video, prompts)).sqrt()

    def logged(video, prompts, **info):
        return brightness(video, prompts)

    logged.differentiable = False
    mix = RewardMix({"fine": brightness, "edge": edge, "logged": logged}, [1.0, 1.0, 0.0])
    broken = broken_rewards(mix, torch.rand(2, 3, 2, 4, 4), ["a", "b"], {"fps": 8})
    assert broken == {"fine": False, "edge": True}


@pytest.mark.parametrize(("elsewhere", "named"), [(False, "no reward"), (True, "the reward brightness")])
def test_what_is_infinite_is_not_finite_and_another_process_may_know_which_reward(elsewhere, named):
    accelerator = SimpleNamespace(device="cpu", gather=lambda flag: torch.cat([flag, torch.full_like(flag, elsewhere)]))
    mix, fine = RewardMix({"brightness": brightness}), torch.zeros(2)
    batch = torch.rand(2, 3, 1, 4, 4), ["a", "b"], {}
    assert non_finite_error(fine, 1.0, None, mix, batch, accelerator) is None
    for norm in (math.inf, math.nan):
        told = str(non_finite_error(fine, norm, None, mix, batch, accelerator))
        assert f"has norm {norm}, expected a finite number; it comes from {named}" in told
    assert isinstance(non_finite_error(fine + math.inf, 1.0, None, mix, batch, accelerator), TrainingError)
