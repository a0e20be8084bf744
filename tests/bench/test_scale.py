"""The benchmark of several devices, tiny, on two CPU processes; its tables by hand."""

import json

import many_runs
import pytest
from processes import together
from scripts import script

bench, tables = script("bench/scale.py"), script("bench/tables.py")
FLAGS = ["--tiny", "--frames", "5", "--steps", "4", "--only", "one device", "sequence"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "scale.json"
    together(many_runs.bench, ["--output", str(path), *FLAGS], processes=2)
    return json.loads(path.read_text())


@pytest.mark.slow
def test_every_phase_of_every_arm_has_a_row(measured):
    rows = {(row["arm"], row["devices"], row["phase"]): row for row in measured["rows"]}
    assert len(rows) == len(measured["rows"])
    for arm, devices in (("one device", 1), ("sequence", 2)):
        for phase in (*bench.PHASES, "step"):
            assert rows[arm, devices, phase]["seconds"] > 0
            assert rows[arm, devices, phase]["peak_gib"] > 0
    assert rows["sequence", 2, "segment"]["layout"] == "data 1 x guidance 1 x sequence 2"
    alone, both = rows["one device", 1, "segment"], rows["sequence", 2, "segment"]
    assert both["efficiency"] == pytest.approx(alone["seconds"] / both["seconds"] / 2)


@pytest.mark.slow
def test_the_small_model_learns_the_same(measured):
    (row,) = [row for row in measured["rows"] if row["phase"] == "equality"]
    assert 0 < row["gradient"] < 1e-5
    assert row["weights"] < 1e-6


def test_multicast_is_off():
    import os

    assert (os.environ["NCCL_NVLS_ENABLE"], os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"]) == ("0", "1")


def test_layouts_of_any_number_of_devices():
    assert list(bench.arms(1)) == ["one device"]
    assert list(bench.arms(3)) == ["one device", "data", "sequence", "data, sharded base"]
    assert bench.arms(16)["guidance and sequence"] == {"guidance_parallel": 2, "sequence_parallel": 8}
    assert "data, guidance and sequence" in bench.arms(8)
    assert "data, guidance and sequence" not in bench.arms(4)


def row(arm, devices, phase, seconds, data, **more):
    told = {"arm": arm, "devices": devices, "frames": 125, "phase": phase, "seconds": seconds, "data": data}
    return told | {"peak_gib": 40.0, "layout": "data"} | more


def test_what_is_worked_out_of_the_phases():
    seconds = {"sampling": 4.0, "segment": 14.0, "decode": 1.0, "sum": 0.5}
    rows = {bench.key(r): r for r in (row("one device", 1, phase, s, 1) for phase, s in seconds.items())}
    told = {"arm": "one device", "devices": 1, "frames": 125, "data": 1}
    whole = bench.worked_out(told, rows, steps=25)
    assert (whole["seconds"], whole["phase"], whole["steps"]) == (24 * 4.0 + 15.5, "step", 25)
    del rows["one device", 1, 125, "sum"]
    assert bench.worked_out(told, rows, steps=25) is None

    alone = {bench.key(r): r for r in [row("one device", 1, "segment", 14.0, 1)]}
    assert bench.with_efficiency(row("data", 4, "segment", 16.0, 4), alone)["efficiency"] == 14 / 16
    assert bench.with_efficiency(row("guidance", 2, "segment", 8.0, 1), alone)["efficiency"] == 14 / 16
    assert "efficiency" not in bench.with_efficiency(row("data", 4, "sampling", 16.0, 4), alone)


def test_the_tables_by_hand():
    rows = [
        row("one device", 1, "segment", 14.0, 1, efficiency=1.0),
        row("guidance", 2, "equality", 0.0, 1, gradient=3e-7, weights=2e-8),
        row("guidance", 2, "segment", 7.2, 1, efficiency=0.9722, peak_gib=30.04),
        {"arm": "guidance", "devices": 2, "frames": 125, "phase": "decode", "skipped": "out of memory"},
    ]
    del rows[1]["seconds"], rows[1]["peak_gib"]
    result = {"environment": {"device": "Chip", "cores": 4, "torch": "9.9", "scored": 1}, "rows": rows}
    text = tables.TABLES["scale.json#layouts"](result)
    assert text.startswith("Measured on Chip (4 cores), torch 9.9.\n\n125 frames, of them decoded: 1\n")
    assert "| 1 | one device | - | 14.00 | - | - | - | 100.0 % | - | 40.0 |" in text
    assert "| 2 | guidance | - | 7.20 | out of memory | - | - | 97.2 % | - | 30.0 |" in text
    assert "| 2 | data | 3.0e-07 | 2.0e-08 |" in tables.TABLES["scale.json#equality"](result)
