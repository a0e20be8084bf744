"""The studies of methods and of cheaper prefixes: equal time or equal steps, and tables."""

import json

import nano_study
import pytest
import study_runs
from scripts import script
from study_pools import Pools

cheaper, methods, tables = script("bench/cheaper.py"), script("bench/methods.py"), script("bench/tables.py")


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Runs that take no time; a step takes 5 s less one for each use of its rollout."""
    made = []

    def train(settings, seed, steps, conditions):
        made.append((seed, steps))
        row = {"base": 0.5, "tuned": 0.6, "diff": 0.1 * (1 + seed)}
        return [dict.fromkeys(("trained", "verifier", "clip", "motion"), row) | {"hacking_gap": 0.25}]

    monkeypatch.setattr(nano_study, "Pools", lambda *_: Pools())
    monkeypatch.setattr(study_runs, "evaluate_base", lambda conditions: {})
    monkeypatch.setattr(study_runs, "seconds_per_step", lambda settings, *_: 5 - settings.get("rollout_reuse", 1))
    monkeypatch.setattr(study_runs, "train", train)
    return made


def test_arms_train_for_the_same_time(made, tmp_path):
    path = tmp_path / "cheaper.json"
    flags = ["--seeds", "0", "1", "--steps", "10", "--device", "cpu", "--output", str(path)]
    for _ in range(2):  # what is done is not made again
        cheaper.main(["--only", "plain", "rollouts used 4 times", *flags])
    assert made == [(0, 10), (0, 40), (1, 10), (1, 40)]
    table = tables.TABLES["cheaper.json#own"](json.loads(path.read_text()))
    assert "40 device-seconds of training each." in table
    assert "| `rollouts used 4 times` | 2 | +0.150 (+0.100 to +0.200) | +15.0 (+10.0 to +20.0) |" in table
    assert table.splitlines()[-1].endswith("| +0.250 (+0.250 to +0.250) | 40 |")


def test_at_full_size_prices_an_arm_trains_for_as_many_steps_as_it_would_there(made, tmp_path):
    prices = cheaper.full_size_prices()
    assert prices["rollouts used 4 times"] < prices["float8 copy"] < 1
    flags = ["--seeds", "1", "--steps", "40", "--device", "cpu", "--output", str(tmp_path / "cheaper.json")]
    cheaper.main(["--only", "rollouts used 4 times" + cheaper.AT_FULL_SIZE, *flags])
    steps = round(40 / prices["rollouts used 4 times"])
    assert made == [(1, steps)]
    result = json.loads((tmp_path / "cheaper.json").read_text())
    assert tables.TABLES["cheaper.json#full"](result).splitlines()[-1].endswith(f"| {steps} |")
    assert "`rollouts used 4 times`" in tables.TABLES["cheaper.json#full"](result)
    assert "rollouts used 4 times" not in tables.TABLES["cheaper.json#own"](result)


def test_methods_train_for_as_many_steps(made, tmp_path):
    path = tmp_path / "methods.json"
    methods.main(["--only", "draft_lv", "srpo", "--seeds", "1", "--device", "cpu", "--output", str(path)])
    assert made == [(1, 80), (1, 80)]
    result = json.loads(path.read_text())
    assert tables.TABLES["methods.json"](result).splitlines()[-1] == (
        "| `srpo` | 1 | +0.200 | +20.0 | +0.200 | +0.250 | +20.0 | 4.000 |"
    )
    assert tables.fill_cells("a <!-- nano: srpo -->not run yet<!-- / -->", result) == (
        "a <!-- nano: srpo -->+0.200, +20.0<!-- / -->"
    )
