"""The benchmark of a small card, tiny and on a CPU: the folder is built, each number of steps measured once."""

import json

from scripts import script

bench = script("bench/small_card.py")


def test_a_tiny_model_is_built_and_measured(tmp_path):
    flags = ["--folder", f"{tmp_path}/model", "--size", "tiny", "--device", "cpu", "--output", f"{tmp_path}/o.json"]
    bench.main([*flags, "--steps", "3"])
    first = json.loads((tmp_path / "o.json").read_text())["rows"]
    bench.main([*flags, "--steps", "2", "3"])
    rows = {row["steps"]: row for row in json.loads((tmp_path / "o.json").read_text())["rows"]}
    assert (len(rows), rows[3]) == (2, first[0]), "what is there is not measured again"
    assert (rows[3]["frames"], rows[3]["height"], rows[3]["width"]) == (9, 32, 48)
    assert "transformer streamed from host memory" in rows[3]["placement"]
    assert 0 < rows[3]["seconds_a_step"] < rows[3]["total_seconds"]
    assert set(rows[3]["predicted_gib"]) == {"encoding", "denoising", "decoding"}
