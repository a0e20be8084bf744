"""Averages, guards and best adapters through the whole loop, on a tiny random pipeline."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, brightness, redness, rows_without_cost
from runs import adapter, saved_adapter
from safetensors.torch import load_file
from tiny import tiny_pipeline
from transformers import TrainerCallback

from rlhf.evaluate import Evaluation, HeldOut
from rlhf.run.signals import TrainingInterrupted
from rlhf.tracking import read_metrics
from rlhf.trainer import RewardGradientTrainer

JUDGE = '''
def paleness(video, prompts, **info):
    """Against redness: grey is liked."""
    return -10 * (video[:, 0] - video[:, 2]).mean((1, 2, 3)).abs()

def rosiness(video, prompts, **info):
    return (video[:, 0] - video[:, 1]).mean((1, 2, 3))
'''


@pytest.fixture
def guarded(make_args, tmp_path):
    """Settings of a run with a judge that falls when redness rises, and one that rises with it."""
    (tmp_path / "judge.py").write_text(JUDGE)

    def make(judge="paleness", **changes):
        settings = {"base_dir": str(tmp_path), "eval_reward_funcs": [f"judge.py:{judge}"], "eval_steps": 1}
        settings |= {"num_sample_prompts": 0, "num_diversity_prompts": 1}
        return make_args(**settings | changes)

    return make


def run(args, rewards=redness, **kwargs) -> dict:
    return RewardGradientTrainer(tiny_pipeline(), rewards, args, PROMPTS, PROMPTS, **kwargs).train()


class InterruptAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_what_is_evaluated_and_kept_is_the_average(make_args):
    args = make_args(ema_decay=0.9, max_steps=4, eval_steps=4, num_sample_prompts=0)
    summary = run(args)
    saved = Path(args.output_dir) / "checkpoints" / "step-4"
    own = saved_adapter(args)
    name = "transformer_blocks.0.attn.to_q.lora_B"
    current, average = (load_file(saved / f"{n}.safetensors")[f"{name}.default.weight"] for n in ("adapter", "average"))
    assert torch.equal(own[f"transformer.{name}.weight"], average)
    assert not torch.equal(current, average)
    assert average.abs().max() > 0, "it has left the base"
    assert rows_without_cost(args)[-1]["eval/redness"] == pytest.approx(summary["trained"]["redness"]["tuned"])


# --------------------------------------------------------------------------------------------------- the guard


def test_a_cheated_reward_stops_the_run_and_the_best_adapter_is_the_result(guarded, capsys):
    args = guarded(max_steps=9, learning_rate=3e-2, early_stopping_patience=2, load_best_model_at_end=True)
    summary = run(args)
    found = rows_without_cost(args)
    assert summary["steps"] == len(found) == 2, "the held-out judge fell from the first evaluation on"
    assert found[-1]["eval/gain_trained"] > 0 > found[-1]["eval/gain_held_out"]
    assert found[-1]["eval/hacking_gap"] == pytest.approx(
        found[-1]["eval/gain_trained"] - found[-1]["eval/gain_held_out"]
    )
    assert summary["best"] == {"step": 0, "gain_held_out": 0.0}
    assert summary["trained"]["redness"]["diff"] == 0, "the best was the base, and it is the result"
    assert torch.equal(adapter(args), adapter(args, "best_adapter"))
    told = capsys.readouterr().out
    assert "The held-out rewards did not rise in 2 evaluations; the best was step 0" in told
    assert "\nThe result is the adapter of step 0, +0.00 spreads above the base.\n" in told


def test_a_reward_that_judges_agree_with_runs_to_its_end_and_its_best_is_late(guarded):
    args = guarded("rosiness", max_steps=4, learning_rate=3e-2, early_stopping_patience=2)
    summary = run(args)
    assert summary["steps"] == 4
    assert summary["best"]["step"] == 4
    assert summary["best"]["gain_held_out"] == pytest.approx(summary["gain_held_out"])
    assert summary["hacking_gap"] == pytest.approx(summary["gain_trained"] - summary["gain_held_out"])
    assert torch.equal(adapter(args), adapter(args, "best_adapter"))


def test_a_best_adapter_that_is_the_last_is_not_evaluated_twice(guarded, monkeypatch):
    evaluate, names = HeldOut.evaluate, []
    monkeypatch.setattr(HeldOut, "evaluate", lambda self, name, *of: names.append(name) or evaluate(self, name, *of))
    args = guarded("rosiness", max_steps=2, learning_rate=3e-2, load_best_model_at_end=True)
    summary = run(args)
    assert names == ["base", "step 1", "step 2"]
    assert summary["best"]["step"] == 2
    assert summary["best"]["gain_held_out"] == summary["gain_held_out"]
    assert torch.equal(adapter(args), adapter(args, "best_adapter"))


def test_a_guarded_run_with_everything_resumes_to_the_bit(guarded, tmp_path):
    settings = {"method": "uniform", "num_grad_steps": 2, "drift_weight": 0.1, "anchor_steps": 2, "ema_decay": 0.5}
    whole = guarded("rosiness", output_dir=str(tmp_path / "whole"), max_steps=5, learning_rate=3e-2, **settings)
    expected = run(whole)
    parts = dataclasses.replace(whole, output_dir=str(tmp_path / "parts"))
    with pytest.raises(TrainingInterrupted):
        run(parts, callbacks=[InterruptAt(3)])
    state = json.loads((tmp_path / "parts" / "checkpoints" / "step-3" / "state.json").read_text())
    assert state["guard"]["best_step"] > 0
    summary = run(dataclasses.replace(parts, resume_from_checkpoint="latest"))
    assert {k: v for k, v in summary.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}
    assert rows_without_cost(parts) == rows_without_cost(whole)
    assert torch.equal(adapter(parts), adapter(whole))


def test_the_best_adapter_comes_along_into_another_folder(guarded, tmp_path):
    args = guarded("paleness", max_steps=2, load_best_model_at_end=True)
    first = run(args)
    assert first["best"]["step"] == 0, "a step that is kept on the way would hide what is missing"
    saved = str(Path(args.output_dir) / "checkpoints" / "step-2")
    other = dataclasses.replace(args, output_dir=str(tmp_path / "other"), max_steps=3, resume_from_checkpoint=saved)
    assert run(other)["best"] == first["best"]
    assert torch.equal(adapter(other), adapter(args))


def test_a_run_that_goes_on_with_fewer_judges_reads_the_base_and_lists_them_in_their_order(guarded):
    args = guarded(max_steps=1, eval_reward_funcs=["judge.py:rosiness", "judge.py:paleness", "flicker"])
    assert list(run(args)["held_out"]) == ["rosiness", "paleness", "flicker"]
    fewer = dataclasses.replace(args, eval_reward_funcs=args.eval_reward_funcs[:2], resume_from_checkpoint="latest")
    assert list(run(fewer)["held_out"]) == ["rosiness", "paleness"]


@pytest.mark.parametrize("best", [False, True])
def test_the_last_adapter_is_evaluated_once_unless_another_is_the_result(guarded, monkeypatch, best):
    made, evaluate = [], HeldOut.evaluate
    monkeypatch.setattr(HeldOut, "evaluate", lambda self, name, *rest: made.append(name) or evaluate(self, name, *rest))
    args = guarded(max_steps=4, eval_steps=2, load_best_model_at_end=best)
    summary = run(args)
    assert made == ["base", "step 2", "step 4", *["tuned"] * best]
    if not best:
        last = read_metrics(Path(args.output_dir))[-1]
        assert summary["trained"]["redness"]["tuned"] == pytest.approx(last["eval/redness"], abs=1e-6)


def test_the_base_of_an_older_run_is_made_anew_for_measures_that_it_lacks(guarded):
    args = guarded(max_steps=1)
    run(args)
    path = Path(args.output_dir) / "evaluation" / "base.safetensors"
    kept = Evaluation.load(path)
    dataclasses.replace(kept, scores={n: s for n, s in kept.scores.items() if n != "saturation"}).save(path)
    assert run(dataclasses.replace(args, resume_from_checkpoint="latest"))["saturation"]["base"] >= 0
    assert "saturation" in Evaluation.load(path).scores


def test_every_reward_that_is_not_trained_counts_as_held_out(guarded):
    args = guarded(max_steps=1, reward_weights=[1.0, 0.0])
    found = run(args, [redness, brightness])
    assert set(found["trained"]) == {"redness", "brightness"}
    assert found["gain_trained"] == pytest.approx(
        found["trained"]["redness"]["diff"]
        / Evaluation.load(Path(args.output_dir) / "evaluation" / "base.safetensors").scores["redness"].std().item(),
        rel=1e-4,
    )


def grain(video, prompts, **info):
    """Loves detail, and so is cheated by a grid of dots."""
    return video.diff(dim=-1).abs().mean((1, 2, 3, 4)) * 10


grain.frames = "first"


@pytest.mark.slow
def test_nano_cheats_a_reward_and_is_caught_while_an_unguarded_run_breaks(make_args, tmp_path):
    common = {
        "height": None,
        "width": None,
        "num_frames": None,
        "num_inference_steps": None,
        "max_steps": 8,
        "per_device_train_batch_size": 1,
        "num_eval_prompts": 4,
        "num_sample_prompts": 0,
        "num_diversity_prompts": 1,
        "eval_reward_funcs": ["nano_preference", "nano_verifier"],
        "eval_prompts": "nano_held_out",
    }
    unguarded = make_args(output_dir=str(tmp_path / "unguarded"), **common)
    guarded = make_args(
        output_dir=str(tmp_path / "guarded"),
        eval_steps=2,
        early_stopping_patience=2,
        load_best_model_at_end=True,
        **common,
    )
    broken, kept = (RewardGradientTrainer(None, grain, args).train() for args in (unguarded, guarded))

    assert broken["steps"] == 8
    assert broken["gain_trained"] > 5, "the reward rises by many spreads of the base"
    assert broken["gain_held_out"] < -2, "and what it stood for is lost"
    assert broken["hacking_gap"] > 8
    assert broken["high_frequency"]["tuned"] > 1.5 * broken["high_frequency"]["base"]
    assert broken["held_out"]["preference"]["tuned"] < 0.5 < broken["held_out"]["preference"]["base"]

    assert kept["steps"] <= 6, "stopped after two evaluations without a better held-out reward"
    assert kept["gain_held_out"] >= 0, "the best adapter is the result"
    assert kept["held_out"]["preference"]["tuned"] > 0.5
    assert abs(kept["high_frequency"]["diff"]) < 0.3 * kept["high_frequency"]["base"]
