"""Flags of the commands are understood alike, and refused before anything is loaded."""

import pytest
import torch
from scripts import script

from rewards import check, score

COMPARE, REPORT, VBENCH = (
    getattr(script(f"eval/{name}.py"), f"parse_{name}_args") for name in ("compare", "report", "vbench")
)
SCORE = ["score", "--full_info", "x.json", "--output", "x", "--json"]


def test_they_are_understood(tmp_path):
    given = score.parse_score_args(["a.mp4", "--reward", "r", "--json", f"{tmp_path}/new.json", "--device", "cpu"])
    assert (given.json, given.device) == (tmp_path / "new.json", torch.device("cpu"))
    assert COMPARE(["a", "b", "--json", "new.json"]).json.name == "new.json", "beside the one who asks"
    assert check.parse_check_args(["r"]).device == torch.device("cpu")


@pytest.mark.parametrize(
    ("parse", "argv", "told"),
    [
        (COMPARE, ["a", "b", "--json", "{nowhere}/a.json"], "got no folder {nowhere}, expected a file in a folder"),
        (COMPARE, ["a", "b", "--json", "{here}"], "got a folder, expected a file"),
        (VBENCH, [*SCORE, "{nowhere}/a.json"], "got no folder {nowhere}, expected a file in a folder"),
        (REPORT, ["run", "--output", "{nowhere}/a.html"], "got no folder {nowhere}, expected a file in a folder"),
        (score.parse_score_args, ["a.mp4", "--reward", "r", "--json", "{nowhere}/a.json"], "got no folder {nowhere}"),
        (COMPARE, ["a", "b", "--json", "{locked}/a.json"], "got no right to write {locked}/a.json, expected one"),
        (score.parse_score_args, ["a.mp4", "--reward", "r", "--device", "cuba"], "device='cuba', expected one of "),
        (REPORT, ["run", "--max_mb", "nan"], "got 'nan'; expected a number of at least 0"),
        (check.parse_check_args, ["r", "--kwargs", "{{a: [.nan]}}"], "expected a mapping such as"),
        (score.parse_score_args, ["a.mp4", "--reward", "r", "--row", "{{n: .nan}}"], "expected a mapping such as"),
        (check.parse_check_args, ["r", "--device", "bogus"], "device='bogus', expected one of "),
    ],
)
def test_what_is_wrong_is_told(parse, argv, told, tmp_path, capsys, monkeypatch):
    places = {"nowhere": tmp_path / "nowhere", "here": tmp_path, "locked": tmp_path / "locked"}
    places["locked"].mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: path != places["locked"])  # root may everything
    with pytest.raises(SystemExit):
        parse([word.format(**places) for word in argv])
    assert told.format(**places) in capsys.readouterr().err
