"""The planner's benchmark, tiny and on a CPU."""

import json

import pytest
from scripts import script

bench, scale = script("bench/planner.py"), script("bench/planner_scale.py")
package, tables = script("bench/package.py"), script("bench/tables.py")
ARMS = ["rates", "nano, batch 16, K = 1", "8B, 17 frames, blocks recomputed"]
PHASES = [
    "sampling",
    "segment forward",
    "decode forward",
    "reward forward",
    "reward backward",
    "decode backward",
    "segment backward",
    "optimizer",
]


def run(path, *flags: str) -> dict:
    bench.main(["--size", "tiny", "--device", "cpu", "--output", str(path), *flags])
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run(tmp_path_factory.mktemp("bench") / "planner.json", "--only", *ARMS)


def test_rows_have_what_constants_could_be_fitted_to(result):
    rows = {row["arm"]: row for row in result["rows"]}
    assert list(rows) == ARMS
    for arm in ARMS[1:]:
        measured, predicted = rows[arm]["measured"], rows[arm]["predicted"]
        assert list(measured["phases"]) == PHASES
        assert all(phase["seconds"] > 0 for phase in measured["phases"].values())
        assert measured["extrapolated"] == arm.startswith("8B")
        assert predicted["peak_gib"] > 0
        assert predicted["seconds"] == pytest.approx(sum(predicted["phases_seconds"].values()))
        assert rows[arm]["seconds_ratio"] == pytest.approx(predicted["seconds"] / measured["seconds"])
    exact = rows[ARMS[-1]]["measured"]
    others = sum(phase["seconds"] for name, phase in exact["phases"].items() if name != "sampling")
    assert exact["seconds"] == pytest.approx(others + 24 * exact["phases"]["sampling"]["seconds"])


def test_predictions_are_made_anew_without_a_device(result, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "pick_device", lambda name: pytest.fail("asked for a device"))
    rows = [row | {"predicted": None} if row["arm"] == ARMS[1] else row for row in result["rows"]]
    (tmp_path / "planner.json").write_text(json.dumps(result | {"rows": rows}))
    assert run(tmp_path / "planner.json", "--stages", "predict", "--only", ARMS[1]) == result


def test_a_second_run_goes_on_and_an_arm_that_fails_says_why(tmp_path, monkeypatch):
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


def test_enough_settings_of_both_sizes():
    assert len(bench.NANO) >= 5
    assert len(bench.FULL) >= 8
    for arm in (*bench.NANO, *bench.FULL):
        bench.RewardGradientConfig(**bench.settings_of(arm, "full"))


def test_the_rates_become_a_module(result):
    found = {}
    exec(package.rates_module(result), found)
    rates = result["rows"][0]["rates"]
    row = found["RATES"][rates["device"]]
    assert bench.Rates(device=rates["device"], **row).flops["matrix float32"] == pytest.approx(
        rates["flops"]["matrix float32"], rel=1e-3
    )
    assert row["waits"] is True


def test_the_table_by_hand():
    def row(arm, peak, seconds):
        both = {"measured": {"peak_gib": peak[0], "seconds": seconds[0]}}
        both |= {"predicted": {"peak_gib": peak[1], "seconds": seconds[1]}}
        ratios = {"seconds_ratio": seconds[1] / seconds[0]} | ({"peak_gib_ratio": peak[1] / peak[0]} if peak[0] else {})
        return {"arm": arm} | both | ratios

    rows = [row("a", (10.0, 11.0), (2.0, 1.5)), row("b", (None, 3.0), (1.0, 1.1)), {"arm": "c", "error": "no"}]
    text = tables.TABLES["planner.json"]({"environment": {"device": "Chip", "cores": 4, "torch": "9.9"}, "rows": rows})
    assert "| a | 10.00 | 11.00 | +10 % | 2.00 | 1.50 | -25 % |" in text
    assert "| b | - | 3.00 | - | 1.00 | 1.10 | +10 % |" in text
    assert "Of memory, 1 settings: 10 % off at most, 10 % on average." in text
    assert "Of time, 2 settings: 25 % off at most, 18 % on average." in text


MEASURED = json.loads((scale.FOLDER / "scale.json").read_text())


@pytest.mark.parametrize("arm", ["sequence", "guidance", "data, sharded base"])
def test_a_process_of_each_layout_is_planned_as_it_was_measured(arm):
    """At full size on two H200; nothing here was fitted to it."""
    rows = {row["phase"]: row for row in MEASURED["rows"] if row["arm"] == arm}
    rates = scale.known_rates(MEASURED["environment"]["device"])
    planned = scale.predicted(rows["step"], MEASURED["environment"], rates)
    for phase, found in planned.items():
        assert found["peak_gib"] == pytest.approx(rows[phase]["peak_gib"], rel=0.05), phase
        assert found["seconds"] == pytest.approx(rows[phase]["seconds"], rel=0.3, abs=0.005), phase


def test_measured_layouts_become_rows_of_the_table(tmp_path, monkeypatch):
    both = {"peak_gib": 9.0, "seconds": 60.0}
    monkeypatch.setattr(scale, "predicted", lambda row, environment, rates: {"step": both})
    scale.main(["--output", str(tmp_path / "planner_scale.json")])
    result = json.loads((tmp_path / "planner_scale.json").read_text())
    steps = [row for row in MEASURED["rows"] if row["phase"] == "step"]
    assert len(result["rows"]) == len(steps)
    assert result["rows"][0]["seconds_ratio"] == 60 / steps[0]["seconds"]
    text = tables.TABLES["planner_scale.json"](result)
    assert text.startswith("Measured on NVIDIA H200")
    assert f"| sequence, 2 devices, 125 frames | {rows_peak(steps, 'sequence'):.2f} | 9.00 |" in text


def rows_peak(rows: list[dict], arm: str) -> float:
    return next(row["peak_gib"] for row in rows if row["arm"] == arm)
