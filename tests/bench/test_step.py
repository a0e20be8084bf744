"""The benchmark of a whole step, tiny and on a CPU: arms agree, tables are right."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scripts import script

from rlhf.contentv.transformer import SD3Transformer3DModel

bench, tables = script("bench/step.py"), script("bench/tables.py")
ARMS = ["stock autograd", "peers' way", "exact", "exact, nothing twice", "24 GiB", "rollouts used 4 times"]


def run(folder: Path, *flags: str) -> list[dict]:
    common = ["--size", "tiny", "--device", "cpu", "--frames", "5", "--repeats", "1", "--output", f"{folder}/step.json"]
    bench.main([*common, "--gradients", str(folder), "--scored", "all", "--steps", "4", *flags])
    return json.loads((folder / "step.json").read_text())["rows"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Of all phases, with compiled arms run as they are."""
    patch = pytest.MonkeyPatch()
    patch.setattr(torch, "compile", lambda function: function)
    found = run(tmp_path_factory.mktemp("bench"), "--arms", *ARMS)
    patch.undo()
    return {(row["arm"], row["phase"]): row for row in found}


def test_every_arm_and_phase_has_a_row(rows):
    assert set(rows) == {(arm, phase) for arm in ARMS for phase in bench.PHASES}
    for row in rows.values():
        assert row["seconds"] > 0
        assert (row["frames"], row["scored"], len(row["all"])) == (5, 5, 1)
        assert row["settings"] == bench.SETTINGS[row["arm"]]


def test_the_gradients_agree_and_no_pixel_is_clamped(rows):
    """All decode in bfloat16; the exact proofs are in float64, in the tests of each part."""
    for arm in ("peers' way", "exact", "exact, nothing twice"):
        against = rows[arm, "window"]["against stock autograd"]
        assert against["cosine"] > 0.995
        assert against["length"] == pytest.approx(1, abs=0.05)
    assert rows["exact", "window"]["against peers' way"]["cosine"] > 0.995
    assert all(row["saturated"] == 0 for (_, phase), row in rows.items() if phase == "window")


def test_wan_runs_beside_its_peers_way(tmp_path):
    arms = ["stock autograd", "peers' way", "exact", "24 GiB"]
    rows = run(tmp_path, "--size", "wan tiny", "--arms", *arms, "--phases", "sampling", "segment", "window", "step")
    assert not [row for row in rows if "seconds" not in row]
    for row in rows:
        if row["phase"] == "window" and row["arm"] != "stock autograd":
            assert row["against stock autograd"]["cosine"] > 0.995
            assert row["against stock autograd"]["length"] == pytest.approx(1, abs=0.05)


def test_a_rollout_used_again_counts_for_each_use(rows):
    row = rows["rollouts used 4 times", "step"]
    assert row["seconds_per_gradient"] == pytest.approx(row["seconds"] / 4)


def test_a_robust_gradient_scores_twice(tmp_path, monkeypatch):
    reward, scored = sys.modules["step_arms"].TinyReward, []
    forward = reward.forward
    monkeypatch.setattr(reward, "forward", lambda *given, **told: scored.append(None) or forward(*given, **told))
    counts = []
    for arm in ("", ", moved video", ", moved adapter"):
        run(tmp_path, "--arms", f"exact, nothing twice{arm}", "--phases", "step")  # twice, the first one untimed
        counts.append(len(scored))
    assert counts == [2, 6, 10]


def test_rows_that_are_there_are_not_measured_again(tmp_path, capsys):
    flags = ("--arms", "exact, nothing twice", "--phases", "sampling")
    first = run(tmp_path, *flags)
    capsys.readouterr()
    assert run(tmp_path, *flags) == first
    assert capsys.readouterr().out == ""
    both = run(tmp_path, "--arms", "exact, nothing twice", "--phases", "sampling", "decode")
    assert both[0] == first[0]
    assert [row["phase"] for row in both] == ["sampling", "decode"]
    assert run(tmp_path, *flags, "--again")[0]["all"] != first[0]["all"]
    assert run(tmp_path, "--arms", "exact", "--limit", "0") == run(tmp_path, *flags), "nothing begins too late"
    assert not list(tmp_path.glob(".unfinished*"))


def test_an_arm_whose_library_is_missing_says_so(tmp_path, monkeypatch):
    for name in ("bitsandbytes", "bitsandbytes.nn"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("rlhf.execution.quantize.importlib.util.find_spec", lambda name: None)
    (base,) = run(tmp_path, "--arms", "4-bit base", "--phases", "sampling")
    assert base["skipped"].startswith("base_bits=4 needs bitsandbytes")


def fail_with(message, error=torch.OutOfMemoryError):
    def fail(*args, **kwargs):
        raise error(message)

    return fail


def test_a_phase_that_does_not_fit_leaves_a_row_that_says_so(tmp_path, monkeypatch):
    """The others go on; a whole step is not begun after its last step failed."""
    errors = iter([torch.OutOfMemoryError, RuntimeError])  # of the device, of pinned host memory
    window = lambda *_: fail_with("CUDA out of memory. Tried to allocate 80 GiB", next(errors))()
    monkeypatch.setattr(bench.Bench, "window", window)
    monkeypatch.setattr(bench.Bench, "step", fail_with("not to be begun", ValueError))
    monkeypatch.setattr(bench, "total_memory", lambda device: 140 * 2**30)
    phases = ["sampling", "window", "step"]
    rows = run(tmp_path, "--size", "wan tiny", "--arms", "peers' way", "exact", "--phases", *phases)
    assert [(row["arm"], row["phase"]) for row in rows] == [(a, p) for a in ("peers' way", "exact") for p in phases]
    for sampled, window, step in (rows[:3], rows[3:]):
        assert sampled["seconds"] > 0
        assert "limit_gib" not in sampled
        assert (window["skipped"], window["limit_gib"]) == ("out of memory", 140)
        assert (step["skipped"], step["limit_gib"]) == ("out of memory: its last step", 140)
    text = tables.TABLES["wan_14b.json"](json.loads((tmp_path / "step.json").read_text()))
    told = "| out of memory at 140 GiB | out of memory: its last step at 140 GiB | over 140 | - | - |"
    assert [line.partition("`VideoX")[1] != "" for line in text.splitlines() if line.endswith(told)] == [True, False]


def test_weights_that_do_not_fit_leave_rows_too(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "Rig", fail_with("CUDA out of memory. Tried to allocate 80 GiB"))
    (row,) = run(tmp_path, "--arms", "24 GiB", "--phases", "step")
    assert (row["skipped"], row["limit_gib"]) == ("out of memory: the weights", 24)
    monkeypatch.setattr(bench, "Rig", fail_with("no such kernel", RuntimeError))
    with pytest.raises(RuntimeError, match="no such kernel"):
        run(tmp_path, "--arms", "exact")


def test_rows_are_written_one_by_one(tmp_path, monkeypatch):
    """A run that is killed keeps the phases that it finished."""
    monkeypatch.setattr(bench.Bench, "decode", fail_with("killed", KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--arms", "exact", "--phases", "sampling", "decode")
    (row,) = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert row["phase"] == "sampling"


def test_the_floor_is_that_of_the_published_sizes():
    """ContentV-8B at 33 and 125 frames, worked out by hand in seconds."""
    arms = sys.modules["step_arms"]
    with torch.device("meta"):
        model = SD3Transformer3DModel()
    for frames, forward, segment in ((33, 0.189, 0.64), (125, 1.59, 5.58)):
        shape = (1, 16, 1 + (frames - 1) // 4, 54, 96)
        rig = SimpleNamespace(transformer=model, shape=shape, size=arms.SIZES["full"])
        assert arms.floor_seconds(rig, "sampling") == pytest.approx(2 * forward, rel=0.011)
        assert arms.floor_seconds(rig, "segment") == pytest.approx(segment, rel=0.011)
        assert arms.floor_seconds(rig, "decode") is None


def row(arm, phase, seconds, **more):
    return {"arm": arm, "frames": 33, "scored": 1, "phase": phase, "seconds": seconds, "peak_gib": 30.0} | more


def test_the_tables_by_hand():
    against = {"against stock autograd": {"cosine": 0.99912, "length": 1.0021}}
    measured = [
        row("peers' way", "sampling", 0.86, floor_seconds=0.378),
        row("peers' way", "step", 24.0, seconds_per_gradient=24.0),
        row("exact, nothing twice", "window", 2.0, peak_gib=61.26, **against),
        row("exact, nothing twice", "step", 18.0, seconds_per_gradient=18.0, first_seconds=18.0),
        row("exact, nothing twice, compiled", "step", 16.0, seconds_per_gradient=16.0, first_seconds=75.0),
        row("rollouts used 4 times", "step", 24.0, seconds_per_gradient=6.0),
        row("4-bit base", "sampling", 0.7, cores=8),
        row("exact", "update", 0.005),
        {"arm": "stock autograd", "frames": 33, "scored": 1, "phase": "step", "skipped": "out of memory"},
    ]
    result = {"environment": {"device": "Chip", "cores": 4, "torch": "9.9"}, "rows": measured}
    exact = tables.TABLES["step.json#exact"](result)
    assert exact.startswith("Measured on Chip (4 cores), torch 9.9.\n\n33 frames, of them decoded and scored: 1\n")
    assert "| `VideoX-Fun's step` | 0.86 (44 % floor) | - | 24.00 | 30.0 | - | - |" in exact
    assert "| `exact, no recomputation` | - | 2.00 | 18.00 | 61.3 | 0.99912, length 1.002 | - |" in exact
    assert "| `stock autograd` | - | - | out of memory | - | - | - |" in exact
    assert "rollouts" not in exact
    cheaper = tables.TABLES["step.json#cheaper"](result)
    assert "| `rollouts used 4 times` | 6.00 | 600 |" in cheaper
    assert "| `VideoX-Fun's step` | 24.00 | 150 |" in cheaper, "of the references what the others have"
    assert "base" not in exact + cheaper
    less = tables.TABLES["step.json#memory"](result)
    assert less.startswith("Measured on Chip (4 or 8 cores)")
    assert less.splitlines()[-2:] == [
        "| `exact` | - | - | 5.0 ms, 30.0 GiB |",
        "| `4-bit base` | 0.70 s, 30.0 GiB | - | - |",
    ]
    compiled = tables.TABLES["step.json#compile"](result)
    assert compiled.splitlines()[2:] == ["| `exact, no recomputation, compiled` | 33 | 59 | 2.00 | 30 |"]
