"""The planner's benchmark, tiny and on a CPU, and the accuracy that its results state."""

import json

import pytest
from scripts import ROOT, script

from rlhf.planner.time import ACCURACY

bench = script("bench/planner.py")
ARMS = ["rates", "nano, batch 16, K = 1", "8B, 17 frames, blocks recomputed"]
STORED = json.loads(bench.RESULT.read_text())


def run(path, *flags: str) -> dict:
    bench.main(["--size", "tiny", "--device", "cpu", "--output", str(path), *flags])
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run(tmp_path_factory.mktemp("bench") / "planner.json", "--only", *ARMS)


def test_rows_have_measurements_and_estimates(result):
    rows = {row["arm"]: row for row in result["rows"]}
    assert list(rows) == ARMS
    for arm in ARMS[1:]:
        measured, predicted = rows[arm]["measured"], rows[arm]["predicted"]
        assert measured["seconds"] > 0
        assert predicted["peak_gib"] > 0
        assert predicted["seconds"] == pytest.approx(sum(predicted["phases_seconds"].values()))
        assert rows[arm]["seconds_ratio"] == pytest.approx(predicted["seconds"] / measured["seconds"])
    assert all(value > 1e6 for value in rows["rates"]["rates"]["flops"].values())


def test_estimates_are_made_anew_without_a_device(result, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "pick_device", lambda name: pytest.fail("asked for a device"))
    rows = [row | {"predicted": None} if row["arm"] == ARMS[1] else row for row in result["rows"]]
    (tmp_path / "planner.json").write_text(json.dumps(result | {"rows": rows}))
    assert run(tmp_path / "planner.json", "--stages", "predict", "--only", ARMS[1]) == result


def test_a_second_run_measures_what_is_missing(tmp_path, monkeypatch):
    def fail(arm, size, device):
        raise RuntimeError("no room")

    monkeypatch.setattr(bench, "measure_nano", fail)
    path, flags = tmp_path / "planner.json", ("--stages", "measure", "--only")
    (row,) = run(path, *flags, "nano, batch 4")["rows"]
    assert row["error"] == "RuntimeError: no room"
    monkeypatch.setattr(bench, "measure_nano", lambda arm, size, device: {"seconds": 1.0, "peak_gib": None})
    both = run(path, *flags, "nano, batch 4", "nano, batch 64")["rows"]
    assert [row["arm"] for row in both] == ["nano, batch 4", "nano, batch 64"]
    assert "error" not in both[0]
    monkeypatch.setattr(bench, "measure_nano", fail)
    assert run(path, *flags, "nano, batch 4", "nano, batch 64")["rows"] == both
    assert run(path, *flags, "nano, batch 16", "--limit", "0")["rows"] == both


def test_every_arm_is_a_run_of_its_own():
    arms = [*bench.NANO, *bench.FULL]
    runs = [bench.RewardGradientConfig(**bench.settings_of(arm, "full")) for arm in arms]
    assert len({repr(run) for run in runs}) == len(arms)


def test_the_table_by_hand():
    def row(arm, peak, seconds):
        measured, predicted = ({"peak_gib": peak[i], "seconds": seconds[i]} for i in (0, 1))
        return bench.compare({"arm": arm, "measured": measured}, predicted)

    rows = [row("a", (10.0, 11.0), (2.0, 1.5)), row("b", (None, 3.0), (1.0, 1.1)), {"arm": "c", "error": "no"}]
    text = bench.table({"environment": {"device": "Chip", "cores": 4, "torch": "9.9"}, "rows": rows})
    assert "| a | 10.00 | 11.00 | +10% | 2.00 | 1.50 | -25% |" in text
    assert "| b | - | 3.00 | - | 1.00 | 1.10 | +10% |" in text
    assert "Memory: 10% off at most, 10% on average, over 1 settings." in text
    assert "Time: 25% off at most, 18% on average, over 2 settings." in text


def test_the_stated_accuracy_is_that_of_the_results():
    worst = {key: error for key, (error, _, _) in bench.accuracy(STORED["rows"]).items()}
    assert worst["seconds"] <= ACCURACY
    assert worst["peak_gib"] <= 0.15
    assert bench.RESULT.with_suffix(".md").read_text() == bench.table(STORED)
    assert bench.accuracy_text(STORED["rows"]) in (ROOT / "docs" / "planner.md").read_text()


@pytest.mark.parametrize("arm", ["nano, batch 4", "8B, 9 frames, K = 2, first frame"])
def test_the_stored_estimates_are_those_of_the_planner(arm):
    stored = next(row for row in STORED["rows"] if row["arm"] == arm)
    found = bench.predicted(arm, "full", bench.H200)
    for key in ("peak_gib", "seconds"):
        assert found[key] == pytest.approx(stored["predicted"][key], rel=1e-3)


@pytest.mark.parametrize("arm", ["sequence", "guidance", "data, sharded base"])
def test_the_memory_of_each_layout_is_that_which_was_measured(arm):
    """At full size on two H200; nothing here was fitted to it."""
    layouts = json.loads((ROOT / "bench" / "results" / "scale.json").read_text())
    rows = {row["phase"]: row for row in layouts["rows"] if row["arm"] == arm}
    found = bench.predict_layout(rows["step"], layouts["environment"])
    for phase, estimate in found.items():
        assert estimate["peak_gib"] == pytest.approx(rows[phase]["peak_gib"], rel=0.05), phase
    assert found["step"]["seconds"] == pytest.approx(rows["step"]["seconds"], rel=ACCURACY)
