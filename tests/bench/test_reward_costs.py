"""The benchmark of the rewards and its tables, on a CPU, with rewards that cost nothing."""

import json

import pytest
import torch
from scripts import script

bench, tables = script("bench/reward_costs.py"), script("bench/tables.py")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "rewards.json"
    common = ["--device", "cpu", "--size", "24", "32", "--repeats", "1", "--output", str(path)]
    bench.main(["--rewards", "flicker", "jpeg_size", *common])
    bench.main(["--rewards", "smoothness", *common])
    return json.loads(path.read_text())


def test_rows_of_each_phase_and_number_of_frames(result):
    assert {row["arm"] for row in result["rows"]} == {"flicker", "jpeg_size", "smoothness"}, "the earlier ones are kept"
    rows = {(row["arm"], row["frames"], row["phase"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 3 * 2 * 2
    for (name, frames, _), row in rows.items():
        if frames == 1 and name != "jpeg_size":
            assert row["skipped"].startswith("1 frame(s); expected at least")
        else:
            assert row["seconds"] > 0
            assert row["peak_gib"] > row["weights_gib"] == 0
    assert (result["environment"]["height"], result["environment"]["width"]) == (24, 32)


def test_another_environment_starts_anew(result, tmp_path):
    path = tmp_path / "rewards.json"
    path.write_text(json.dumps(result))
    bench.main(
        ["--rewards", "jpeg_size", "--device", "cpu", "--size", "16", "16", "--repeats", "1", "--output", str(path)]
    )
    assert {row["arm"] for row in json.loads(path.read_text())["rows"]} == {"jpeg_size"}


@pytest.mark.parametrize("name", bench.MEASURED)
def test_each_reward_can_be_built_without_hub_or_disk(name, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    formats = bench.formats(name)
    for dtype in formats:
        reward = bench.build(name, torch.device("meta"), dtype)
        assert reward.frames == "all"
        if isinstance(reward, torch.nn.Module):
            assert {p.device.type for p in reward.parameters()} == {"meta"}
            half = dtype == "bfloat16" or bench.CATALOGUE[name].bytes_each == 2
            assert (max(reward.parameters(), key=torch.numel).dtype == torch.bfloat16) == half
    assert ("bfloat16" in formats) == ("dtype" in bench.accepted(name) and bench.CATALOGUE[name].bytes_each == 4)


def test_the_table_by_hand():
    common = {"arm": "clip_score", "dtype": "bfloat16", "frames": 8, "weights_gib": 0.7964}
    one = common | {"arm": "flicker", "dtype": "float32", "frames": 1, "weights_gib": 0.0, "skipped": "1 frame(s)"}
    full = one | {"arm": "mps", "weights_gib": 4.0, "skipped": "out of memory"}
    rows = [
        one | {"phase": "forward"},
        one | {"phase": "forward and backward"},
        full | {"phase": "forward"},
        full | {"phase": "forward and backward"},
        common | {"phase": "forward", "seconds": 0.01234, "peak_gib": 1.0},
        common | {"phase": "forward and backward", "seconds": 0.03456, "peak_gib": 2.345},
    ]
    environment = {"device": "Chip", "torch": "9.9", "height": 432, "width": 768, "repeats": 5}
    lines = tables.rewards_table({"environment": environment, "rows": rows}).splitlines()
    assert lines[0] == "One video of 432x768 on one Chip, torch 9.9, median of 5:"
    assert lines[4:] == [
        "| `mps` | float32 | 1 | out of memory | out of memory | out of memory | 4.00 |",
        "| `clip_score` | bfloat16 | 8 | 12.3 | 34.6 | 2.35 | 0.80 |",
    ]
