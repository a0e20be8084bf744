"""A run writes its report however it ends, and never instead of saying what ended it."""

import json
import os
import signal
from pathlib import Path

import pytest
from report_runs import Page
from toy_rewards import PROMPTS, redness
from transformers import TrainerCallback

from rewards import RewardError
from rlhf import report
from rlhf.config import ConfigError
from rlhf.report.data import Run
from rlhf.trainer import RewardGradientTrainer


@pytest.mark.parametrize(("held_out", "samples"), [(True, 2), (True, 0), (False, 2)])
def test_training_ends_with_a_report(tiny_pipe, make_args, real_report, held_out, samples):
    args = make_args(max_steps=1, num_eval_prompts=2, num_sample_prompts=samples)
    held_out_prompts = ["of\ntwo lines", PROMPTS[0]] if held_out else None
    RewardGradientTrainer(tiny_pipe, redness, args, PROMPTS, held_out_prompts).train()
    folder = Path(args.output_dir)
    page = Page((folder / "report.html").read_text())
    (row,) = Run(folder).metrics
    assert page.cells["loss"] == [row["loss"]] * 5
    assert "finished: 1 of 1 steps" in page.text
    assert len(page.cards) == (samples if held_out else 0)
    assert (folder / "samples").exists() == (folder / "contact_sheet.png").exists() == (held_out and samples > 0)
    assert all(gains for gains, _ in page.cards)
    if held_out:
        summary = json.loads((folder / "summary.json").read_text())["trained"]["redness"]
        assert page.cells["redness"][:2] == [summary["base"], summary["tuned"]]
    assert "energy not measured by the device" in page.text


class Ends(TrainerCallback):
    """Ends the run from within, after an evaluation or a step."""

    def __init__(self, event, action):
        setattr(self, event, lambda *_, **__: action())


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def turncoat(video, prompts, **info):
    assert info["step"] == 0, "no more"
    return redness(video, prompts)


ENDS = {
    "a signal before the first step": (
        redness,
        Ends("on_evaluate", terminate),
        "an interruption, by Ctrl-C or a signal. Go on with",
        0,
    ),
    "a signal in a step": (
        redness,
        Ends("on_step_end", terminate),
        "by Ctrl-C or a signal; checkpoints/step-1 holds its state. Go on with",
        1,
    ),
    "a reward that fails": (turncoat, TrainerCallback(), "reward 'turncoat': got AssertionError: no more", 1),
    "an error elsewhere": (redness, Ends("on_log", lambda: 1 / 0), "ZeroDivisionError: division by zero", 1),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_run_that_does_not_finish_leaves_its_report_too(tiny_pipe, make_args, real_report, capsys, how):
    reward, callback, told, steps = ENDS[how]
    args = make_args(max_steps=3, num_eval_prompts=2, num_sample_prompts=0, num_diversity_prompts=0)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises((KeyboardInterrupt, RewardError, ZeroDivisionError)):
        RewardGradientTrainer(tiny_pipe, reward, args, PROMPTS, PROMPTS[:2], callbacks=[callback]).train()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert ("Interrupted: writing" in capsys.readouterr().err) == ("signal" in how), "said before it takes its time"
    page = Page((Path(args.output_dir) / "report.html").read_text())
    assert f"not finished: {steps} of 3 steps were done" in page.text
    assert "It ended with" in page.text
    assert told in page.text
    assert "s, evaluation included" in page.text, "the time until then"
    assert ("loss" in page.cells) == (steps > 0)


@pytest.mark.parametrize("another", [OSError("no room"), KeyboardInterrupt()])
def test_a_report_that_fails_does_not_hide_what_ended_the_run(started, monkeypatch, caplog, another):
    def fail(folder, ended_by):
        assert ended_by == "RuntimeError: the first"
        raise another

    monkeypatch.setattr(report, "finish_report", fail)
    with pytest.raises(RuntimeError, match="the first"), report.report_at_end(started, True):
        raise RuntimeError("the first")
    assert f"no report of the run in {started} could be written: {type(another).__name__}" in caplog.text


def test_settings_with_which_no_run_began_leave_no_report(tmp_path, started, monkeypatch):
    monkeypatch.setattr(report, "finish_report", lambda *_: pytest.fail("written"))
    with pytest.raises(ConfigError), report.report_at_end(started, True):
        raise ConfigError(["wrong"])
    with pytest.raises(RuntimeError), report.report_at_end(tmp_path / "nowhere", True):
        raise RuntimeError
    with pytest.raises(RuntimeError), report.report_at_end(started, wanted=False):
        raise RuntimeError
