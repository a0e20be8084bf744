"""The studies of methods and of cheaper steps: equal steps or equal time, and tables."""

import json

import nano_study
import pytest
import study_runs
from scripts import script
from study_pools import Pools

cheaper, methods, tables = script("bench/cheaper.py"), script("bench/methods.py"), script("bench/tables.py")


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Runs that take no time; a step takes 4 s."""
    made = []

    def train(settings, seed, steps, conditions):
        made.append((seed, steps))
        row = {"base": 0.5, "tuned": 0.6, "diff": 0.1 * (1 + seed)}
        return [dict.fromkeys(("trained", "verifier", "clip", "motion", "diversity"), row) | {"hacking_gap": 0.25}]

    monkeypatch.setattr(nano_study, "Pools", lambda *_: Pools())
    monkeypatch.setattr(study_runs, "evaluate_base", lambda conditions: {})
    monkeypatch.setattr(study_runs, "seconds_per_step", lambda *_: 4.0)
    monkeypatch.setattr(study_runs, "train", train)
    return made


def test_arms_train_for_as_many_steps_as_the_full_size_model_would_in_the_same_time(made, monkeypatch, tmp_path):
    fast = f"{cheaper.TOGETHER}{cheaper.FA3}"
    exact = cheaper.EXACT_BEST.partition(cheaper.FA3)[0]
    seconds = {exact: 16.0, cheaper.EXACT_BEST: 12.0, "half the steps": 8.0, fast: 2.0}
    rows = [
        {"arm": arm, "phase": "step", "frames": 33, "scored": 1, "seconds_per_gradient": seconds[arm]}
        for arm in seconds
    ]
    (tmp_path / "step.json").write_text(
        json.dumps({"rows": [*rows, rows[2] | {"frames": 125, "seconds_per_gradient": 1}]})
    )
    monkeypatch.setattr(cheaper, "STEP", tmp_path / "step.json")
    flags = ["--seeds", "0", "1", "--steps", "10", "--device", "cpu", "--output", str(tmp_path / "cheaper.json")]
    for _ in range(2):  # what is done is not made again
        cheaper.main(["--only", "plain", "half the steps", fast, *flags])
    assert made == [(seed, steps) for seed in (0, 1) for steps in (10, 20, 60)], "each against its own exact arm"
    table = tables.TABLES["cheaper.json"](json.loads((tmp_path / "cheaper.json").read_text()))
    assert "| `half the steps` | 2 | +0.150 (+0.100 to +0.200) | +15.0 (+10.0 to +20.0) |" in table
    assert table.splitlines()[-1].endswith("| +0.250 (+0.250 to +0.250) | +20.0 (+20.0 to +20.0) | 60 |")
    with pytest.raises(SystemExit):
        cheaper.main(["--only", "a quarter of the steps", *flags])  # not measured at full size


def test_methods_train_for_as_many_steps(made, tmp_path):
    path = tmp_path / "methods.json"
    methods.main(["--only", "draft_lv", "srpo", "--seeds", "1", "--device", "cpu", "--output", str(path)])
    assert made == [(1, 80), (1, 80)]
    result = json.loads(path.read_text())
    assert tables.TABLES["methods.json"](result).splitlines()[-1] == (
        "| `srpo` | 1 | +0.200 | +20.0 | +0.200 | +0.250 | +20.0 | 4.000 |"
    )
