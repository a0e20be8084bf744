"""Held-out monitoring: gains by hand, when a run stops, and averages and best adapters through the
whole loop.
"""

import contextlib
import dataclasses
import json
import os
import signal
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import At, adapter, saved_adapter, train
from safetensors.torch import load_file
from toy_rewards import brightness, redness, rows_without_cost

from rlhf.config import RewardGradientConfig
from rlhf.evaluation.held_out import Evaluation, HeldOut
from rlhf.report.data import Run
from rlhf.run.folder import BEST
from rlhf.run.metrics import read_metrics
from rlhf.run.signals import TrainingInterrupted
from rlhf.trainer import RewardGradientTrainer
from rlhf.training.failures import TrainingError
from rlhf.training.monitor import Guard, HeldOutMonitor, gain, gains

# --------------------------------------------------------------------------------- gains and guards


def evaluation(**scores):
    return Evaluation(["a", "b"], {name: torch.tensor(values) for name, values in scores.items()}, torch.zeros(0))


BASE = evaluation(taught=[1.0, 3.0], other=[0.0, 1.0], judge=[10.0, 30.0], constant=[1.0, 1.0])
TUNED = evaluation(taught=[3.0, 5.0], other=[0.0, 0.0], judge=[10.0, 20.0], constant=[1.0, 0.0])
SPREAD = 2**0.5  # of 1 and 3


def test_a_gain_is_in_spreads_of_the_base_and_rounding_is_no_spread():
    assert gain("taught", BASE, TUNED) == pytest.approx(2 / SPREAD)
    assert gain("judge", BASE, TUNED) == pytest.approx(-5 / (10 * SPREAD))
    assert gain("constant", BASE, TUNED) is None, "without a spread there is no unit"
    saturated, lower = evaluation(judge=[1.0, 1.0 - 2**-24]), evaluation(judge=[0.99, 0.99])
    assert gain("judge", saturated, lower) is None, "else one hundredth would count as -200,000 spreads"


def test_the_gap_is_the_trained_gain_less_the_held_out_one():
    found = gains(BASE, TUNED, {"taught": 1.0}, ["judge", "constant"])
    assert found["gain_trained"] == pytest.approx(2 / SPREAD)
    assert found["gain_held_out"] == pytest.approx(-0.5 / SPREAD)
    assert found["hacking_gap"] == pytest.approx(2.5 / SPREAD)
    of_two = gains(BASE, TUNED, {}, ["judge", "taught", "constant"])
    assert of_two == {"gain_held_out": pytest.approx((-0.5 + 2) / 2 / SPREAD)}, "the mean of those that can be told"


def test_trained_gains_are_weighted_and_a_negative_weight_wants_less():
    found = gains(BASE, TUNED, {"taught": 3.0, "other": -1.0, "judge": 0.0}, [])
    assert set(found) == {"gain_trained"}
    assert found["gain_trained"] == pytest.approx((3 * 2 / SPREAD + 0.5 / (SPREAD / 2)) / 4)
    assert gains(BASE, TUNED, {"constant": 1.0, "judge": 0.0}, ["constant"]) == {}


def test_a_trained_gain_with_a_target_is_that_of_coming_nearer(guarded):
    for target, expected in ((5.0, 2.0), (0.0, -2.0), (3.0, 0.0)):  # 1 and 3 become 3 and 5
        found = gains(BASE, TUNED, {"taught": 1.0, "judge": 0.0}, [], {"taught": target, "other": 0.0})
        assert found == {"gain_trained": pytest.approx(expected / SPREAD)}
    args = guarded(max_steps=1, reward_targets={"redness": -9.0})
    found = run(args)
    before = Evaluation.load(Path(args.output_dir) / "evaluation" / "base.safetensors").scores["redness"]
    assert found["gain_trained"] == pytest.approx(-found["trained"]["redness"]["diff"] / before.std().item(), rel=1e-4)


def test_a_guard_stops_after_its_patience_and_remembers_the_best_of_which_the_base_is_the_first():
    guard = Guard(patience=2)
    seen = []
    for step, value in enumerate([0.5, 0.45, 0.9, 0.9, 0.2], start=1):
        seen.append((guard.update(step, {"gain_held_out": value}), guard.stop))
    assert seen == [(True, False), (False, False), (True, False), (False, False), (False, True)]
    assert (guard.best_step, guard.best_gain) == (3, 0.9)
    guard = Guard(patience=1)
    assert not guard.update(10, {"gain_held_out": 0.0}), "an adapter that has learnt nothing is no better"
    assert (guard.stop, guard.best_step, guard.best_gain) == (True, 0, 0.0)


def test_a_guard_needs_a_held_out_reward_and_evaluations_and_stops_only_if_asked():
    assert Guard.from_settings(RewardGradientConfig(eval_steps=5)) is None
    assert Guard.from_settings(RewardGradientConfig(eval_reward_funcs=["nano_clip"])) is None
    watched = RewardGradientConfig(eval_steps=5, eval_reward_funcs=["nano_clip"])
    guard = Guard.from_settings(watched)
    assert guard.patience == 0
    for step in range(50):
        guard.update(step, {})
    assert not guard.stop


@pytest.fixture
def watch(tmp_path):
    """What looks at a run, on a process that writes nothing; `asked` is what it had evaluated, and
    whether averaged.
    """

    def make(judge="judge", **settings):
        settings = {"eval_steps": 1, "eval_reward_funcs": [judge], "resume_from_checkpoint": "latest"} | settings
        args, bases, asked, averaged = RewardGradientConfig(**settings), [], [], [False]

        @contextlib.contextmanager
        def average(_):
            averaged[0] = True
            yield
            averaged[0] = False

        held_out = types.SimpleNamespace(
            folder=tmp_path,
            judges={"taught": None, judge: None},
            layout=types.SimpleNamespace(is_main_process=False, device="cpu", reduce=lambda tensor, how: tensor),
            base=lambda resumed, make: bases.append((resumed, make)) or BASE,
            bases=bases,
            evaluate=lambda name, step: asked.append((name, step, averaged[0])) or TUNED,
        )
        masters = types.SimpleNamespace(average=None, use=average)
        notify, guard = lambda event, **more: None, Guard.from_settings(args)
        trained, resume_from = {"taught": 1.0}, args.resume_from_checkpoint
        return HeldOutMonitor(held_out, trained, masters, notify, guard, resume_from), asked

    return make


def test_a_guard_that_a_resumed_run_is_given_begins_with_what_was_learnt(watch):
    """Not with the gain of the base, which the adapter that is gone on with is no longer."""
    watching, asked = watch()
    watching.begin(None, 40, None)
    assert asked == [("step 40", 40, True)]
    assert (watching.guard.best_step, watching.guard.best_gain) == (40, pytest.approx(-0.5 / SPREAD))
    assert watching.latest == (40, TUNED)


@pytest.mark.parametrize(("first", "saved"), [(0, None), (40, {"best_gain": 0.5, "best_step": 30, "worse": 1})])
def test_a_guard_that_is_new_with_its_run_or_came_along_asks_for_no_evaluation(watch, first, saved):
    watching, asked = watch()
    watching.begin(None, first, saved)
    assert asked == []
    assert watching.state().items() >= (saved or {"best_gain": 0.0, "best_step": 0, "worse": 0}).items()
    watching.evaluate_or_sample(first + 1, evaluate=True, sample=False)
    assert asked == [(f"step {first + 1}", first + 1, True)], "of the average"
    watching.finish(first + 1, 0.0)
    assert len(asked) == 1, "it is known"
    watching.finish(first + 2, 0.0)
    assert asked[1][:2] == ("tuned", first + 2), "an older one is not the result"


@pytest.mark.parametrize("which", [None, "latest"])
def test_only_a_run_that_goes_on_reads_its_base_again(watch, which):
    watching, _ = watch(resume_from_checkpoint=which)
    watching.begin("videos of the base", 0, None)
    assert watching.held_out.bases == [(which is not None, "videos of the base")]


def test_a_best_gain_by_another_measure_is_none_of_the_run_that_goes_on(watch):
    before = watch()[0]
    before.begin(None, 0, None)
    before.guard.best_gain, before.guard.best_step = 9.0, 30
    saved = json.loads(json.dumps(before.state()))
    watching, asked = watch()
    watching.begin(None, 40, saved)
    assert (watching.guard.best_gain, asked) == (9.0, [])
    watching, asked = watch("other")
    watching.begin(None, 40, saved)
    assert (watching.guard.best_step, asked) == (40, [("step 40", 40, True)])
    for place in range(3):  # prompts, settings, judges
        others = list(saved["told_in"])
        others[place] = ["others"]
        watching, asked = watch()
        watching.begin(None, 40, saved | {"told_in": others})
        assert (watching.guard.best_step, asked) == (40, [("step 40", 40, True)])


def test_what_was_before_and_what_came_after_are_kept_and_shown(watch, monkeypatch, tmp_path):
    written, (watching, _) = [], watch()
    monkeypatch.setattr("rlhf.training.monitor.write_results", lambda *given: written.append(given))
    watching.begin(None, 0, None)
    watching.is_main = True
    watching.finish(3, 0.0)
    before, after = written[0][3:]
    assert before is BASE.videos_NCTHW
    assert after is TUNED.videos_NCTHW
    assert Evaluation.load(tmp_path / "evaluation" / "tuned.safetensors").means() == TUNED.means()


def test_the_best_adapter_of_another_run_does_not_replace_the_own_one(watch, tmp_path):
    watching, _ = watch(resume_from_checkpoint=str(tmp_path / "theirs" / "checkpoints" / "step-3"))
    watching.is_main, watching.best_folder = True, tmp_path / "ours" / BEST
    for run in ("theirs", "ours"):
        (tmp_path / run / BEST).mkdir(parents=True)
        (tmp_path / run / BEST / "whose").write_text(run)
    watching._copy_best()
    assert (tmp_path / "ours" / BEST / "whose").read_text() == "ours"


@pytest.mark.parametrize("asked", [{"early_stopping_patience": 2}, {"load_best_model_at_end": True}])
def test_a_run_that_goes_by_gains_needs_some(watch, asked):
    with pytest.raises(TrainingError, match="scores all 2 held-out prompts of the base alike"):
        watch("constant", **asked)[0].begin(None, 0, None)
    watch("constant")[0].begin(None, 0, None)  # one that is only looked at does not


# ----------------------------------------------------------------------------------- the whole loop

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


run = partial(train, evaluate=True)


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


# ---------------------------------------------------------------------------------------- the guard


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
    assert "\nThe result is the adapter of step 0, +0.00 standard deviations above the base.\n" in told


def test_a_run_that_stopped_goes_on_only_with_more_patience(guarded, tmp_path, capsys):
    settings = {"max_steps": 9, "learning_rate": 3e-2, "early_stopping_patience": 1, "save_steps": 1}
    args = guarded(**settings)
    assert run(args)["steps"] == 1
    again = dataclasses.replace(args, max_steps=10, resume_from_checkpoint="latest")
    assert run(again)["steps"] == 1
    assert "did not rise in 1 evaluations" in capsys.readouterr().out
    assert run(dataclasses.replace(again, early_stopping_patience=3))["steps"] == 3


def test_a_reward_that_judges_agree_with_runs_to_its_end_and_its_best_is_late(guarded):
    args = guarded("rosiness", max_steps=4, learning_rate=3e-2, early_stopping_patience=2)
    summary = run(args)
    assert summary["steps"] == 4
    assert summary["best"]["step"] == 4
    assert summary["best"]["gain_held_out"] == pytest.approx(summary["gain_held_out"])
    assert summary["hacking_gap"] == pytest.approx(summary["gain_trained"] - summary["gain_held_out"])
    assert torch.equal(adapter(args), adapter(args, "best_adapter"))


def test_a_guarded_run_with_everything_resumes_to_the_bit(guarded, tmp_path):
    settings = {"method": "uniform", "num_grad_steps": 2, "drift_weight": 0.1, "anchor_steps": 2, "ema_decay": 0.5}
    whole = guarded("rosiness", output_dir=str(tmp_path / "whole"), max_steps=5, learning_rate=3e-2, **settings)
    expected = run(whole)
    parts = dataclasses.replace(whole, output_dir=str(tmp_path / "parts"))
    with pytest.raises(TrainingInterrupted):
        run(parts, callbacks=[At(3, lambda _: os.kill(os.getpid(), signal.SIGINT))])
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


def test_a_best_adapter_of_a_step_after_the_checkpoint_is_not_that_of_the_resumed_run(guarded, tmp_path):
    """Neither in the folder of a killed run, nor in another that goes on from an older checkpoint."""
    args = guarded("rosiness", max_steps=3, save_steps=1, learning_rate=3e-2, load_best_model_at_end=True)
    assert run(args)["best"]["step"] == 3
    saved = str(Path(args.output_dir) / "checkpoints" / "step-1")
    other = dataclasses.replace(args, output_dir=str(tmp_path / "other"), resume_from_checkpoint=saved)
    still = dataclasses.replace(other, max_steps=2, learning_rate=0.0)  # nothing better than step 1 follows
    summary = run(still)
    assert summary["best"]["step"] == 1
    assert summary["gain_held_out"] == pytest.approx(summary["best"]["gain_held_out"])
    assert torch.equal(adapter(still), adapter(still, "best_adapter"))
    assert not torch.equal(adapter(still), adapter(args))


def test_a_run_that_goes_on_with_fewer_judges_reads_the_base_and_lists_them_in_their_order(guarded):
    args = guarded(max_steps=1, eval_reward_funcs=["judge.py:rosiness", "judge.py:paleness", "flicker"])
    assert list(run(args)["held_out"]) == ["rosiness", "paleness", "flicker"]
    fewer = dataclasses.replace(args, eval_reward_funcs=args.eval_reward_funcs[:2], resume_from_checkpoint="latest")
    assert list(run(fewer)["held_out"]) == ["rosiness", "paleness"]


@pytest.mark.parametrize(
    ("judge", "best", "result"),
    [("paleness", False, "step 4"), ("paleness", True, "tuned"), ("rosiness", True, "step 4")],
)
def test_the_last_adapter_is_evaluated_once_unless_another_is_the_result(guarded, monkeypatch, judge, best, result):
    made, evaluate = [], HeldOut.evaluate
    monkeypatch.setattr(HeldOut, "evaluate", lambda self, name, *rest: made.append(name) or evaluate(self, name, *rest))
    args = guarded(judge, max_steps=4, eval_steps=2, learning_rate=3e-2, load_best_model_at_end=best)
    summary = run(args)
    assert list(dict.fromkeys(["base", "step 2", "step 4", result])) == made
    last = read_metrics(Path(args.output_dir))[-1]
    if result == "step 4":
        assert summary["trained"]["redness"]["tuned"] == pytest.approx(last["eval/redness"], abs=1e-6)
    assert summary["best"]["step"] == (4 if judge == "rosiness" else 0)
    assert torch.equal(adapter(args), adapter(args, "best_adapter")) == best


def test_the_last_step_is_a_candidate_for_the_best_whenever_evaluations_are_due(guarded):
    """The result was the base, untrained, where no evaluation was due before the end."""
    args = guarded("rosiness", max_steps=3, eval_steps=5, learning_rate=3e-2, load_best_model_at_end=True)
    summary = run(args)
    assert summary["best"]["step"] == 3
    assert summary["trained"]["redness"]["diff"] > 0
    state = json.loads((Path(args.output_dir) / "checkpoints" / "step-3" / "state.json").read_text())
    assert state["guard"]["best_step"] == 3, "a resumed run knows of it"


def test_the_base_of_an_older_run_is_made_anew_for_measures_that_it_lacks(guarded):
    args = guarded(max_steps=1)
    run(args)
    path = Path(args.output_dir) / "evaluation" / "base.safetensors"
    kept = Evaluation.load(path)
    dataclasses.replace(kept, scores={n: s for n, s in kept.scores.items() if n != "saturation"}).save(path)
    assert run(dataclasses.replace(args, resume_from_checkpoint="latest"))["saturation"]["base"] >= 0
    assert "saturation" in Evaluation.load(path).scores


def test_a_judge_of_the_same_name_that_is_another_judges_the_base_anew(guarded):
    args = guarded(max_steps=1, eval_reward_funcs=["judge=judge.py:rosiness", "other=flicker"])
    run(args)
    for judges in (["judge=judge.py:paleness", "other=flicker"], ["judge=judge.py:paleness", "other=frame_difference"]):
        found = run(dataclasses.replace(args, eval_reward_funcs=judges, resume_from_checkpoint="latest"))["held_out"]
        fresh = dataclasses.replace(args, eval_reward_funcs=judges, output_dir=f"{args.output_dir}-{judges[1]}")
        assert found == run(fresh)["held_out"]


def test_a_result_that_is_of_an_earlier_adapter_does_not_stay(guarded):
    args = guarded(max_steps=1)
    run(args)
    folder = Path(args.output_dir)
    unjudged = {"eval_prompts": None, "eval_reward_funcs": [], "eval_steps": 0}
    train(dataclasses.replace(args, max_steps=2, resume_from_checkpoint="latest", **unjudged))
    assert Run(folder).exported_step == 2
    assert Run(folder).result_rows() == []
    assert not (folder / "evaluation" / "tuned.safetensors").exists()


def test_every_reward_that_is_not_trained_counts_as_held_out(guarded):
    args = guarded(max_steps=1, reward_weights=[1.0, 0.0])
    found = run(args, [redness, brightness])
    assert set(found["trained"]) == {"redness"}
    assert "brightness" in found["held_out"]
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
    common = dict.fromkeys(("height", "width", "num_frames", "num_inference_steps"))
    common |= {"max_steps": 8, "per_device_train_batch_size": 1, "num_eval_prompts": 4, "num_sample_prompts": 0}
    common |= {"num_diversity_prompts": 1, "eval_prompts": "nano_held_out"}
    common |= {"eval_reward_funcs": ["nano_preference", "nano_verifier"]}
    guard = {"eval_steps": 2, "early_stopping_patience": 2, "load_best_model_at_end": True}
    unguarded = make_args(output_dir=str(tmp_path / "unguarded"), **common)
    guarded = make_args(output_dir=str(tmp_path / "guarded"), **common, **guard)
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


# --------------------------------------------------------------------------------- at another size


def test_an_evaluation_has_a_size_of_its_own(make_args, tmp_path, monkeypatch):
    """Base and tuned are alike without learning, and the base is that of a run that trains at this size."""
    size = {"height": 32, "width": 48, "num_frames": 9}
    shapes = []

    def seen(video, prompts, **info):
        shapes.append(tuple(video.shape[2:]))
        return redness(video, prompts)

    args = make_args(eval_size=size, learning_rate=0.0, max_steps=1)
    train(args, seen, evaluate=True)
    assert {*shapes} == {(5, 16, 32), (9, 32, 48)}
    base, tuned = (
        Evaluation.load(Path(args.output_dir) / "evaluation" / f"{n}.safetensors") for n in ("base", "tuned")
    )
    assert base.videos_NCTHW.shape[2:] == (9, 32, 48)
    assert torch.equal(base.videos_NCTHW, tuned.videos_NCTHW)
    assert torch.equal(base.scores["seen"], tuned.scores["seen"])
    assert base.settings["height"] == 32

    there = make_args(**size, learning_rate=0.0, max_steps=1, output_dir=str(tmp_path / "there"))
    train(there, seen, evaluate=True)
    other = Evaluation.load(Path(there.output_dir) / "evaluation" / "base.safetensors")
    assert torch.equal(other.videos_NCTHW, base.videos_NCTHW)
    assert other.settings == base.settings

    made, evaluate = [], HeldOut.evaluate
    monkeypatch.setattr(HeldOut, "evaluate", lambda self, name, *rest: made.append(name) or evaluate(self, name, *rest))
    resumed = {"resume_from_checkpoint": "latest", "max_steps": 2}
    train(dataclasses.replace(args, **resumed), seen, evaluate=True)
    assert made == ["tuned"]
    train(dataclasses.replace(args, **resumed | {"eval_size": {"height": 16}, "max_steps": 3}), seen, evaluate=True)
    assert made == ["tuned", "base", "tuned"]
