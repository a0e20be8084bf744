"""Gains and the gap between them, by hand; when a run is stopped."""

import contextlib
import json
import types

import pytest
import torch

from rlhf.checks import check_config
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.evaluate import Evaluation
from rlhf.failures import TrainingError
from rlhf.guards import Guard, gain, gains
from rlhf.watch import Watch


def evaluation(**scores):
    return Evaluation(["a", "b"], {name: torch.tensor(values) for name, values in scores.items()}, torch.zeros(0))


BASE = evaluation(taught=[1.0, 3.0], other=[0.0, 1.0], judge=[10.0, 30.0], constant=[1.0, 1.0])
TUNED = evaluation(taught=[3.0, 5.0], other=[0.0, 0.0], judge=[10.0, 20.0], constant=[1.0, 0.0])
SPREAD = 2**0.5  # of 1 and 3


def test_a_gain_is_in_spreads_of_the_base():
    assert gain("taught", BASE, TUNED) == pytest.approx(2 / SPREAD)
    assert gain("judge", BASE, TUNED) == pytest.approx(-5 / (10 * SPREAD))
    assert gain("constant", BASE, TUNED) is None, "without a spread there is no unit"


def test_rounding_is_no_spread():
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


def test_a_guard_stops_after_its_patience_and_remembers_the_best():
    guard = Guard(patience=2, threshold=0.1)
    seen = []
    for step, value in enumerate([0.5, 0.55, 0.9, 0.95, 0.2], start=1):
        seen.append((guard.is_best(step, {"gain_held_out": value}), guard.stop))
    assert seen == [(True, False), (False, False), (True, False), (False, False), (False, True)]
    assert (guard.best_step, guard.best_gain) == (3, 0.9)


def test_the_base_is_the_first_best():
    guard = Guard(patience=1, threshold=0.0)
    assert not guard.is_best(10, {"gain_held_out": 0.0}), "an adapter that has learnt nothing is no better"
    assert guard.stop
    assert (guard.best_step, guard.best_gain) == (0, 0.0)


def test_a_guard_needs_a_held_out_reward_and_evaluations_and_stops_only_if_asked():
    assert Guard.of(RewardGradientConfig(eval_steps=5)) is None
    assert Guard.of(RewardGradientConfig(eval_reward_funcs=["nano_clip"])) is None
    watched = RewardGradientConfig(eval_steps=5, eval_reward_funcs=["nano_clip"], early_stopping_threshold=0.2)
    guard = Guard.of(watched)
    assert (guard.patience, guard.threshold) == (0, 0.2)
    for step in range(50):
        guard.is_best(step, {})
    assert not guard.stop


@pytest.fixture
def watch(tmp_path):
    """What looks at a run, on a process that writes nothing; `asked` is what it had evaluated, and whether averaged."""

    def make(judge="judge", **settings):
        settings = {"eval_steps": 1, "eval_reward_funcs": [judge], "resume_from_checkpoint": "latest"} | settings
        args, asked, averaged = RewardGradientConfig(**settings), [], [False]

        @contextlib.contextmanager
        def average():
            averaged[0] = True
            yield
            averaged[0] = False

        held_out = types.SimpleNamespace(
            args=args,
            folder=tmp_path,
            judges={"taught": None, judge: None},
            layout=types.SimpleNamespace(is_main_process=False),
            base=lambda resumed, make: BASE,
            evaluate=lambda name, step: asked.append((name, step, averaged[0])) or TUNED,
        )
        masters = types.SimpleNamespace(averaged=average)
        return Watch(held_out, {"taught": 1.0}, None, masters, lambda event, **more: None), asked

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
    assert watching.saved().items() >= (saved or {"best_gain": 0.0, "best_step": 0, "worse": 0}).items()


def test_a_best_gain_by_another_measure_is_none_of_the_run_that_goes_on(watch):
    before = watch()[0]
    before.begin(None, 0, None)
    before.guard.best_gain, before.guard.best_step = 9.0, 30
    saved = json.loads(json.dumps(before.saved()))
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


@pytest.mark.parametrize("asked", [{"early_stopping_patience": 2}, {"load_best_model_at_end": True}])
def test_a_run_that_goes_by_gains_needs_some(watch, asked, tmp_path):
    with pytest.raises(TrainingError, match="scores all 2 held-out prompts of the base alike"):
        watch("constant", **asked)[0].begin(None, 0, None)
    watch("constant")[0].begin(None, 0, None)  # one that is only looked at does not
    args = RewardGradientConfig(output_dir=str(tmp_path / "new"), eval_steps=1, num_eval_prompts=1, **asked)
    args.eval_reward_funcs, args.eval_prompts = ["nano_clip"], "nano_held_out"
    with pytest.raises(ConfigError, match="got one held-out prompt, expected two or more"):
        check_config(args)
