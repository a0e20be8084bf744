"""A run that is stopped in any way resumes with the same metrics and adapter, to the bit."""

import dataclasses
import math
import os
import random
import signal
import time
from pathlib import Path

import many_runs
import pytest
import torch
from processes import Started, start
from runs import saved_adapter, train
from safetensors.torch import load_file
from toy_rewards import redness, rows_without_cost
from transformers import TrainerCallback

from rewards import RewardError
from rlhf.config import RewardGradientConfig
from rlhf.run.checkpoint import SavingError, newest_undamaged_checkpoint
from rlhf.run.signals import TrainingInterrupted
from rlhf.train import EXIT_INTERRUPTED
from rlhf.training.failures import TrainingError

# Of everything with a state: optimizer, learning rate, average, random choices, drift.
EVERYTHING = {
    "max_steps": 12,
    "method": "drtune",
    "num_grad_steps": 2,
    "drift_weight": 0.1,
    "anchor_steps": 4,
    "ema_decay": 0.9,
    "lr_scheduler_type": "linear",
    "warmup_steps": 3,
    "gradient_accumulation_steps": 2,
    "save_steps": 1,
}


@pytest.fixture
def settings(make_args, tmp_path):
    return lambda name, **changes: make_args(output_dir=str(tmp_path / name), **(EVERYTHING | changes))


def go_on(args: RewardGradientConfig) -> RewardGradientConfig:
    """As a user would: from the latest checkpoint, or anew if none was finished."""
    saved = newest_undamaged_checkpoint(Path(args.output_dir) / "checkpoints")
    return dataclasses.replace(
        args, **({"resume_from_checkpoint": "latest"} if saved else {"overwrite_output_dir": True})
    )


def result(args) -> tuple[list[dict], dict[str, torch.Tensor]]:
    return rows_without_cost(args), saved_adapter(args)


def assert_same(args, other) -> None:
    (rows, adapter), (other_rows, other_adapter) = result(args), result(other)
    assert rows == other_rows
    assert adapter.keys() == other_adapter.keys()
    assert all(torch.equal(adapter[name], other_adapter[name]) for name in adapter)


class SignalAt(TrainerCallback):
    def __init__(self, step: int, number: int):
        self.step, self.number = step, number

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def test_interruptions_at_random_steps_leave_no_trace(settings):
    whole, parts = settings("whole", max_steps=8), settings("parts", max_steps=8)
    train(whole)
    steps = sorted(random.Random(0).sample(range(1, 8), 6))
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    for i, step in enumerate(steps):
        with pytest.raises(TrainingInterrupted):
            train(go_on(parts), callbacks=[SignalAt(step, signals[i % 3])])
    train(go_on(parts))
    assert_same(whole, parts)


class Killed(BaseException):
    """Like a kill: nothing handles it."""


def fail_at(count: int, error: BaseException):
    """A `_flush` that fails at a call: seven a save, of five files, their folder, and the one above."""
    calls = []

    def flush(path):
        calls.append(path)
        if len(calls) >= count:
            raise error

    return flush


def test_a_kill_or_a_full_disk_in_the_middle_of_a_save_leaves_no_trace(settings, monkeypatch):
    """What a kill leaves on the disk, at the moments that differ; real kills are below."""
    whole = settings("whole", max_steps=4)
    train(whole)
    full = OSError(28, "No space left on device")
    for moment, count, error, raised, left in (
        ("in a file", 11, full, (SavingError, "step-2 could not be written: the disk is full"), "step-1"),
        ("before the third file", 17, Killed(), (Killed, None), "step-3.tmp"),
        ("before the rename", 20, Killed(), (Killed, None), "step-3.tmp"),
        ("after the rename", 21, Killed(), (Killed, None), "step-3"),
    ):
        parts = settings(moment, max_steps=4)
        with monkeypatch.context() as patch:
            patch.setattr("rlhf.run.checkpoint._flush", fail_at(count, error))
            with pytest.raises(raised[0], match=raised[1]):
                train(parts)
        assert max(p.name for p in (Path(parts.output_dir) / "checkpoints").iterdir()) == left, moment
        train(go_on(parts))
        assert_same(whole, parts)


# ---------------------------------------- steps that cannot be taken


def broken_at(steps, bad):
    """A reward that is bad in these steps, from 0; probed in step 0."""

    def reward(video, prompts, **info):
        return bad(video, prompts) if info["step"] in steps and "probe" not in info else redness(video, prompts)

    reward.name = "turncoat"
    return reward


def nan_score(video, prompts):
    return redness(video, prompts) * math.nan


def nan_gradient(video, prompts):
    return (redness(video, prompts) - redness(video, prompts)).sqrt()


def raising(video, prompts):
    raise ZeroDivisionError("division by zero")


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (nan_score, "reward 'turncoat': got the score nan for prompt"),
        (nan_gradient, "it comes from the reward turncoat"),
        (raising, "reward 'turncoat': got ZeroDivisionError: division by zero for the prompts"),
    ],
)
def test_single_steps_are_skipped_said_and_leave_the_weights_alone(settings, bad, why, capsys):
    args = settings("run", max_steps=5, anchor_steps=0, max_skipped_steps=1, drift_weight=0.0)
    train(args, broken_at({1, 3}, bad))
    rows, _ = result(args)
    assert [row.get("skipped") for row in rows] == [None, 1, None, 1, None]
    assert all(why in rows[i]["why"] for i in (1, 3))
    assert f"Step 2 was skipped: {rows[1]['why']}" in capsys.readouterr().out
    weights = [
        load_file(Path(args.output_dir) / "checkpoints" / f"step-{i}" / "adapter.safetensors") for i in (3, 4, 5)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[1][name], weights[2][name]) for name in weights[0])


@pytest.mark.parametrize(("bad", "error"), [(raising, RewardError), (nan_gradient, TrainingError)])
def test_too_many_in_a_row_end_the_run_with_its_last_good_state(settings, bad, error):
    args = settings("run", max_steps=9, anchor_steps=0, max_skipped_steps=2)
    with pytest.raises(error, match="turncoat"):
        train(args, broken_at({2, 3, 4, 5}, bad))
    folder = Path(args.output_dir) / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-2", "step-3", "step-4"]
    weights = [load_file(folder / f"step-{i}" / "adapter.safetensors") for i in (2, 4)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# ---------------------------------------- real kills


def running(args, processes: int) -> list[Started]:
    config = Path(args.output_dir).with_suffix(".yaml")
    config.write_text(args.to_yaml())
    return start(many_runs.slowly_saved, config, processes=processes)


def finish(processes: list[Started], codes=(0,)) -> None:
    for one in processes:
        one.finish(codes, timeout=240)


def wait_for(path: Path, processes: list[Started]) -> None:
    while not path.exists():
        assert all(one.process.is_alive() for one in processes), processes[0].output.read_text()
        time.sleep(0.002)


def kill(processes: list[Started]) -> None:
    for one in processes:
        one.process.kill()
        one.process.join()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])  # together twelve interruptions of either kind of run
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_in_saves_and_stopped_by_signals_the_run_ends_the_same(settings, processes, seed):
    whole, parts = settings("whole"), settings("parts")
    finish(running(whole, processes))
    *killed, stopped = sorted(random.Random(seed).sample(range(1, EVERYTHING["max_steps"] - 1), 4))
    checkpoints = Path(parts.output_dir) / "checkpoints"
    for step in killed:
        started = running(go_on(parts), processes)
        wait_for(checkpoints / f"step-{step}.tmp", started)
        kill(started)
    started = running(go_on(parts), processes)
    wait_for(checkpoints / f"step-{stopped}", started)
    started[-1].process.terminate()  # one of them: they agree
    finish(started, codes=(0, EXIT_INTERRUPTED))
    finish(running(go_on(parts), processes))
    assert_same(whole, parts)
