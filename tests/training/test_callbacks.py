"""Callbacks as transformers has them: its own ones work, decisions hold for all processes, events
come in order.
"""

import types
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline
from toy_rewards import PROMPTS, redness
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl

from rlhf.run.metrics import read_metrics
from rlhf.trainer import RewardGradientTrainer
from rlhf.training.callbacks import Callbacks


def train(args, callbacks, evaluate=False):
    trainer = RewardGradientTrainer(
        tiny_pipeline(), redness, args, PROMPTS, PROMPTS if evaluate else None, callbacks=callbacks
    )
    return trainer, trainer.train()


class Recorder(TrainerCallback):
    """What each event was told: step, metrics or logs; model and optimizer have to come along."""

    def __init__(self):
        self.seen = []

    def _note(self, event, state, **told):
        assert isinstance(told["model"], torch.nn.Module)
        assert isinstance(told["optimizer"], torch.optim.Optimizer)
        self.seen.append((event, state.global_step, told.get("metrics") or told.get("logs")))

    def on_evaluate(self, args, state, control, **told):
        self._note("evaluate", state, **told)

    def on_step_begin(self, args, state, control, **told):
        assert (control.should_save, control.should_evaluate) == (False, False), "decisions last for one step"
        self._note("begin", state, **told)

    def on_step_end(self, args, state, control, **told):
        self._note("end", state, **told)

    def on_log(self, args, state, control, **told):
        self._note("log", state, **told)


def test_every_event_comes_in_order_with_what_belongs_to_it(make_args):
    recorder = Recorder()
    args = make_args(max_steps=2, eval_steps=2, num_sample_prompts=0, num_diversity_prompts=0)
    trainer, summary = train(args, [recorder], evaluate=True)
    order = [("evaluate", 0), ("begin", 0), ("end", 1), ("log", 1), ("begin", 1), ("end", 2), ("evaluate", 2)]
    assert [(event, step) for event, step, _ in recorder.seen] == [*order, ("log", 2), ("evaluate", 2)]
    told = [metrics for event, _, metrics in recorder.seen if event == "evaluate"]
    assert told[0]["eval/redness"] == pytest.approx(summary["trained"]["redness"]["base"])
    assert told[-1]["eval/redness"] == pytest.approx(summary["trained"]["redness"]["tuned"])
    assert told[1]["eval/gain_trained"] == told[-1]["eval/gain_trained"]
    logs = [logs for event, _, logs in recorder.seen if event == "log"]
    assert logs == trainer.state.log_history == read_metrics(Path(args.output_dir))
    assert trainer.state.epoch == logs[-1]["epoch"]


def test_transformers_own_callbacks_work(make_args, capsys):
    train(make_args(max_steps=2), [PrinterCallback, ProgressCallback()])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{'step'")]
    assert len(printed) >= 2
    assert "'rewards/redness':" in printed[0]


class AtEvaluation(TrainerCallback):
    def on_evaluate(self, args, state, control, **_):
        if state.global_step == 2:
            control.should_save = control.should_training_stop = True


def test_an_evaluation_may_save_and_stop(make_args):
    settings = {"eval_steps": 1, "save_steps": 0, "num_sample_prompts": 0, "num_diversity_prompts": 0}
    args = make_args(max_steps=5, save_total_limit=0, **settings)
    saves = []

    class Saved(TrainerCallback):
        def on_save(self, args, state, control, **_):
            saves.append(state.global_step)

    _, summary = train(args, [AtEvaluation(), Saved()], evaluate=True)
    assert summary["steps"] == 2
    assert saves == [2, 2], "as asked, and at the end"


def test_a_control_that_is_returned_takes_the_place_of_the_one_before(make_args):
    class Replacing(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            return TrainerControl(should_training_stop=True)

    trainer, summary = train(make_args(max_steps=5), [Replacing()])
    assert summary["steps"] == 1
    assert trainer.callbacks.control.should_training_stop


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("other", [True, False])
def test_what_one_process_decides_holds_for_all_until_the_next_step(make_args, own, other):
    gather = lambda flag: torch.cat([flag, torch.tensor([other], dtype=flag.dtype)])
    process = types.SimpleNamespace(is_main_process=False, is_local_main_process=True, device="cpu", gather=gather)
    callbacks = Callbacks(None, make_args(), process)
    control = callbacks.control
    control.should_save = control.should_evaluate = control.should_training_stop = own
    assert callbacks.is_requested("save") == (own or other)
    callbacks.begin_step()
    assert (control.should_save, control.should_evaluate, control.should_training_stop) == (False, False, own)
    assert (callbacks.state.is_world_process_zero, callbacks.state.is_local_process_zero) == (False, True)
