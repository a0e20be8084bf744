"""bench/hacking.py keeps the rows that it has made."""

import json
import shutil

import pytest
from scripts import script

hacking = script("bench/hacking.py")


def test_stored_rows_are_those_of_the_arms_and_not_made_again(tmp_path, monkeypatch):
    stored = json.loads(hacking.RESULT.read_text())["rows"]
    assert {row["arm"]: row["settings"] for row in stored} == {arm: hacking.settings_of(arm) for arm in hacking.ARMS}
    monkeypatch.setattr(hacking, "run_arm", lambda arm, device: pytest.fail(f"{arm} is made again"))
    drawn = {}
    monkeypatch.setattr(hacking, "draw_frames", lambda rows, path: drawn.update(frames=rows))
    monkeypatch.setattr(hacking, "draw_curves", lambda rows, path: drawn.update(curves=rows))
    monkeypatch.setattr(hacking, "RESULT", tmp_path / "hacking.json")
    shutil.copy(hacking.ROOT / "bench" / "results" / "hacking.json", hacking.RESULT)
    hacking.main(["--device", "cpu", "--output", str(hacking.RESULT)])
    assert drawn == {"frames": stored, "curves": stored}


def test_the_gap_at_an_equal_gain_lies_between_evaluations():
    curve = [{"eval/gain_trained": gain, "eval/hacking_gap": gap} for gain, gap in ((1.0, 0.5), (5.0, 6.5), (3.0, 9.0))]
    assert hacking.gap_at({"curve": curve}, 0.5) == 0.25, "from the base on"
    assert hacking.gap_at({"curve": curve}, 4.0) == 5.0, "where it is first reached"
    assert hacking.gap_at({"curve": curve}, 6.0) is None


def test_a_new_row_comes_in_the_order_of_the_arms(tmp_path, monkeypatch):
    stored = json.loads(hacking.RESULT.read_text())
    first, *others = stored["rows"]
    path = tmp_path / "hacking.json"
    path.write_text(json.dumps(stored | {"rows": others}))
    monkeypatch.setattr(hacking, "run_arm", lambda arm, device: first)
    hacking.main(["--device", "cpu", "--output", str(path), "--only", first["arm"]])
    assert json.loads(path.read_text())["rows"] == stored["rows"]
