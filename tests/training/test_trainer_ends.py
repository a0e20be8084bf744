"""How a training ends before its time: interrupted and resumed to the bit, stopped by a callback,
failed clearly.
"""

import dataclasses
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from runs import At, adapter, saved_adapter, train
from tiny import tiny_pipeline
from toy_rewards import PROMPTS, brightness, redness, rows_without_cost
from transformers import TrainerCallback

from rewards import RewardError
from rlhf.config import ConfigError
from rlhf.evaluation.held_out import HeldOut
from rlhf.run.checkpoint import newest_undamaged_checkpoint
from rlhf.run.metrics import read_metrics
from rlhf.run.signals import TrainingInterrupted
from rlhf.trainer import RewardGradientTrainer
from rlhf.training.batches import BatchResult
from rlhf.training.failures import TrainingError
from rlhf.training.rewards import open_rewards

# --------------------------------------------------------------------------------------- it goes on


def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(make_args, tmp_path):
    whole = make_args(output_dir=str(tmp_path / "whole"), max_steps=5, gradient_accumulation_steps=2)
    expected = train(whole, evaluate=True)

    args = dataclasses.replace(whole, output_dir=str(tmp_path / "parts"))
    with pytest.raises(TrainingInterrupted) as caught:
        train(args, evaluate=True, callbacks=[At(2, lambda _: os.kill(os.getpid(), signal.SIGINT))])
    assert caught.value.checkpoint == tmp_path / "parts" / "checkpoints" / "step-2"
    assert caught.value.checkpoint.is_dir()
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward": 99}\n')  # of a step after the checkpoint
    (tmp_path / "parts" / "evaluation" / "base.safetensors").unlink()  # to be made again, without the adapter
    summary = train(dataclasses.replace(args, resume_from_checkpoint="latest"), evaluate=True)

    assert summary["trained"] == expected["trained"]
    assert rows_without_cost(args) == rows_without_cost(whole)
    for name, tensor in saved_adapter(whole).items():
        assert torch.equal(tensor, saved_adapter(args)[name]), name


def interrupt(_=None):
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("where", ["a step", "an evaluation"])
def test_a_second_signal_saves_the_last_finished_step(make_args, tmp_path, capfd, monkeypatch, where):
    settings = {"max_steps": 4, "save_steps": 0, "eval_steps": 3, "num_sample_prompts": 0, "num_diversity_prompts": 0}
    settings |= {"ema_decay": 0.9}  # an evaluation is of the average, a checkpoint of the weights
    whole, args = (make_args(output_dir=str(tmp_path / name), **settings) for name in ("whole", "parts"))
    train(whole, evaluate=True)

    def twice(self, *place):
        if place[:2] in ((2, 0), ("step 3", 3)):
            interrupt()
            interrupt()
        return original(self, *place)

    of, name = {"a step": (RewardGradientTrainer, "_reward_gradient"), "an evaluation": (HeldOut, "evaluate")}[where]
    original = getattr(of, name)
    monkeypatch.setattr(of, name, twice)
    with pytest.raises(TrainingInterrupted) as caught:
        train(args, evaluate=True)
    monkeypatch.setattr(of, name, original)
    done = {"a step": 2, "an evaluation": 3}[where]
    assert caught.value.checkpoint.name == f"step-{done}"
    told = {"a step": "finishing step 3, then", "an evaluation": "finishing the evaluation of step 3, then saving"}
    assert told[where] in capfd.readouterr().err
    assert [row["step"] for row in read_metrics(tmp_path / "parts")] == [*range(1, done + 1)]
    train(dataclasses.replace(args, resume_from_checkpoint="latest"), evaluate=True)
    assert torch.equal(adapter(whole), adapter(args))


def test_a_folder_that_cannot_be_made_is_told(make_args, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.checks._may_write", lambda place: True)  # as on a file system that says so
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="got no folder there .* expected one that can be made; choose another"):
        train(make_args(output_dir=str(tmp_path / "file" / "run")))


def test_a_trainer_trains_once(make_args):
    """A cell of a notebook that is run again: the run would begin anew with what is learnt, over
    its own files.
    """
    args = make_args(max_steps=1)
    trainer = RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS)
    trainer.train()
    learnt = saved_adapter(args)
    with pytest.raises(TrainingError, match=r"train\(\) was called again, .* resume_from_checkpoint='latest' to go on"):
        trainer.train()
    for name, tensor in saved_adapter(args).items():
        assert torch.equal(tensor, learnt[name]), name


@pytest.mark.parametrize(("evaluate", "folder"), [(True, "run"), (False, "run"), (True, "other")])
def test_resuming_a_finished_run_only_finishes_it_in_another_folder_too(make_args, tmp_path, evaluate, folder):
    args = make_args(max_steps=2)
    first = train(args, evaluate=evaluate)
    saved = "latest" if folder == "run" else str(tmp_path / "run" / "checkpoints" / "step-2")
    args = dataclasses.replace(args, output_dir=str(tmp_path / folder), resume_from_checkpoint=saved)
    again = train(args, evaluate=evaluate)
    assert again["steps"] == first["steps"] == 2
    assert again.get("trained") == first.get("trained")


def test_a_step_is_saved_where_its_evaluation_fails(make_args, monkeypatch):
    args, evaluate = make_args(max_steps=4, save_steps=0, eval_steps=3), HeldOut.evaluate

    def broken(self, name, *rest):
        if name == "step 3":
            raise RuntimeError("out of memory")
        return evaluate(self, name, *rest)

    monkeypatch.setattr(HeldOut, "evaluate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(args, evaluate=True)
    monkeypatch.setattr(HeldOut, "evaluate", evaluate)
    assert newest_undamaged_checkpoint(Path(args.output_dir) / "checkpoints").name == "step-3"
    again = train(dataclasses.replace(args, resume_from_checkpoint="latest"), evaluate=True)
    whole = dataclasses.replace(args, output_dir=args.output_dir + "_whole")
    assert again["trained"] == train(whole, evaluate=True)["trained"]


def test_a_callback_stops_the_training_and_hears_of_everything(make_args):
    told = []

    class Listener(TrainerCallback):
        def __getattribute__(self, name):
            if name.startswith("on_"):
                told.append(name)
            return super().__getattribute__(name)

    def stop(control):
        control.should_training_stop = control.should_evaluate = control.should_save = True

    args = make_args(max_steps=9)
    summary = train(args, evaluate=True, callbacks=[Listener(), At(2, stop)])
    assert summary["steps"] == 2
    assert [row["step"] for row in read_metrics(Path(args.output_dir))] == [1, 2]
    assert "eval/redness" in read_metrics(Path(args.output_dir))[1]
    step = ["on_step_begin", "on_step_end"]
    events = ["on_init_end", "on_train_begin", "on_evaluate", *step, "on_log", *step, "on_evaluate", "on_log"]
    assert told == [*events, "on_save", "on_save", "on_evaluate", "on_train_end"]


# --------------------------------------------------------------------------------- it fails clearly


def after(step: int, bad):
    """A reward that is good until it has been trained on for `step` steps. The probe asks it twice
    before.
    """
    calls = []

    def reward(video, prompts, **info):
        calls.append("probe" not in info)
        return bad(video) if sum(calls) > step else redness(video, prompts)

    reward.name = "turncoat"
    return reward


@pytest.mark.parametrize(
    ("bad", "error", "told"),
    [
        (lambda v: redness(v, 0) * math.nan, RewardError, "reward 'turncoat': got the score nan for prompt"),
        (lambda v: redness(v, 0).sum(), RewardError, r"reward 'turncoat': got scores of shape \(\)"),
        (lambda v: redness(v, 0).detach(), RewardError, "reward 'turncoat': got scores without a gradient in this"),
        (lambda v: (redness(v, 0) - redness(v, 0)).sqrt(), TrainingError, "comes from the reward turncoat"),
        (lambda v: redness(v, 0) * 0, TrainingError, "The gradient at the adapter is exactly zero"),
    ],
)
def test_a_reward_that_breaks_is_named_and_the_last_good_step_saved(make_args, bad, error, told):
    args = make_args(max_steps=5)
    with pytest.raises(error, match=told):
        train(args, [after(2, bad), brightness] if "zero" not in told else after(2, bad))
    assert [p.name for p in (Path(args.output_dir) / "checkpoints").iterdir()] == ["step-2"]
    assert len(read_metrics(Path(args.output_dir))) == 2


@pytest.mark.parametrize("batch", [0, 2])
def test_a_reward_that_breaks_on_one_of_several_batches_is_named(make_args, batch):
    broken = []

    def fragile(video, prompts, **info):
        scores_B = redness(video, prompts)
        return scores_B + (scores_B - scores_B).sqrt() if prompts == broken else scores_B

    args = make_args(gradient_accumulation_steps=3, per_device_train_batch_size=1, method="draft_lv")
    trainer = RewardGradientTrainer(tiny_pipeline(), [fragile, brightness], args, PROMPTS)
    broken += trainer.batches.batch(1, batch).prompts
    with pytest.raises(TrainingError, match="comes from the reward fragile"):
        trainer.train()


def test_no_reward_is_blamed_for_an_anchor_step(make_args):
    """Not even the one that made the step before it fail."""
    args = make_args(max_steps=4, anchor_steps=2, max_skipped_steps=1)
    broken = after(0, lambda v: (redness(v, 0) - redness(v, 0)).sqrt())
    trainer = RewardGradientTrainer(tiny_pipeline(), broken, args, PROMPTS)
    assert "comes from the reward turncoat" in trainer.step(0)["why"]
    assert trainer.step(1)["grad_norm"] == 0, "nothing was trained yet, so nothing has drifted"
    assert "comes from the reward turncoat" in trainer.step(2)["why"]

    def no_number(step, micro, plan):
        trainer.masters.vector.grad.fill_(math.nan)
        return BatchResult({"loss": torch.zeros(2), "drift": torch.zeros(2)})

    trainer._anchor_gradient = no_number
    with pytest.raises(TrainingError, match="comes from no reward"):
        trainer.step(3)


BROKEN = """
def plain(video, prompts, **info):
    return video[:, 0].mean((1, 2, 3))

def detached(video, prompts, **info):
    return plain(video.detach(), prompts)

def whole(video, prompts, **info):
    return (plain(video, prompts) * 255).round()
whole.differentiable = False

def changes(video, prompts, **info):
    video.data.mul_(2).sub_(1)
    return plain(video, prompts)

def exits(video, prompts, **info):
    raise SystemExit("bye")

def together(video, prompts, **info):
    return plain(video, prompts) - plain(video, prompts).mean()
"""
TRAINED, HELD_OUT = "reward_funcs", "eval_reward_funcs"


@pytest.mark.parametrize(
    ("key", "name", "told"),
    [
        (TRAINED, "detached", "got no gradient at the pixels"),
        (TRAINED, "whole", "got differentiable=False; .* Train with --method nft"),
        (TRAINED, "exits", "got SystemExit: bye"),
        (TRAINED, "changes", "got a video that the reward changed in place"),
        (HELD_OUT, "exits", "got SystemExit: bye"),
        (HELD_OUT, "changes", "got a video that the reward changed in place"),
        (HELD_OUT, "together", "expected independence of batch neighbours"),
    ],
)
def test_a_reward_or_judge_that_cannot_work_is_refused_before_weights_load(
    make_args, tmp_path, monkeypatch, key, name, told
):
    monkeypatch.setattr("rlhf.training.setup.find_base", lambda *_, **__: pytest.fail("loaded weights"))
    (tmp_path / "broken.py").write_text(BROKEN)
    settings = {TRAINED: ["broken.py:plain"], "base_dir": str(tmp_path), "eval_prompts": "nano_held_out"}
    args = make_args(model="nano", **settings | {key: [f"broken.py:{name}"]})
    with pytest.raises(RewardError, match=f"^reward '{name}': .*({told})"):
        RewardGradientTrainer(args=args)
    assert not Path(args.output_dir).exists()


def test_judges_and_logged_rewards_need_no_gradient(make_args, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    rewards = ["broken.py:plain", "broken.py:detached", "one=broken.py:whole"]
    settings = {"reward_weights": [1.0, 0.0, 0.0], HELD_OUT: ["two=broken.py:whole"], "base_dir": str(tmp_path)}
    args = make_args(model="nano", reward_funcs=rewards, eval_prompts="nano_held_out", **settings)
    assert list(open_rewards(args)) == ["plain", "detached", "one", "two"]


LATE = """
import time
def reward(video, prompts, **info):
    time.sleep(60)
class Late:
    def __call__(self, video, prompts, **info):
        return video.mean((1, 2, 3, 4))
    def check_prompts(self, prompts):
        time.sleep(60)
"""


@pytest.mark.parametrize(("frames", "told"), [("first", "1 of 5"), (3, "3 of 5")])
def test_a_window_of_all_frames_that_are_decoded_is_refused(make_args, frames, told):
    def leading(video, prompts, **info):
        return redness(video, prompts)

    leading.frames = frames
    with pytest.raises(ConfigError, match=f"decode_window: got 3 with {told} frames to decode for leading"):
        RewardGradientTrainer(tiny_pipeline(), leading, make_args(decode_window=3), PROMPTS)


@pytest.mark.parametrize("name", ["reward", "Late"])
def test_first_calls_that_do_not_come_back_name_the_reward(make_args, tmp_path, name):
    (tmp_path / "late.py").write_text(LATE)
    args = make_args(model="nano", reward_funcs=[f"late.py:{name}"], base_dir=str(tmp_path), reward_timeout=0.5)
    with pytest.raises(RewardError, match=f"^reward '{name}': got no end of its first calls after 0.5 s"):
        open_rewards(args)


def test_wrong_settings_are_told_before_weights_load(make_args, monkeypatch):
    monkeypatch.setattr("rlhf.training.setup.find_base", lambda *_, **__: pytest.fail("loaded weights"))
    with pytest.raises(ConfigError, match="3 problems"):
        RewardGradientTrainer("no/where/model", "no_reward", make_args(max_steps=0), PROMPTS)
