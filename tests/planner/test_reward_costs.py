"""Costs of rewards are those that were measured."""

import json
from pathlib import Path

import pytest
from scripts import script

from rewards.catalogue import CATALOGUE
from rlhf.planner.reward_costs import COSTS, decoded_frames, reward_cost, scored_frames

ROOT = Path(__file__).parents[2]


def test_the_packaged_costs_are_those_of_the_benchmark():
    bench = script("bench/reward_costs.py")
    assert bench.COSTS_FILE.read_text() == bench.package(json.loads(bench.RESULT.read_text()))
    assert {key.split()[0] for key in COSTS} <= set(CATALOGUE)


def test_a_cost_is_a_line_through_what_was_measured():
    rows = json.loads((ROOT / "bench" / "results" / "rewards.json").read_text())["rows"]
    of = {
        row["frames"]: row
        for row in rows
        if (row["arm"], row["dtype"], row["phase"]) == ("hps_v2_1", "float32", "forward and backward")
    }
    one, eight = reward_cost("hps_v2_1", {}, 1), reward_cost("hps_v2_1", {}, 8)
    for frames, found in ((1, one), (8, eight)):
        assert found.seconds == pytest.approx(of[frames]["seconds"], abs=1e-4)
        assert (found.weight_bytes + found.peak_bytes) / 2**30 == pytest.approx(of[frames]["peak_gib"], abs=2e-3)
    assert reward_cost("hps_v2_1", {}, 15).seconds == pytest.approx(2 * eight.seconds - one.seconds)
    assert reward_cost("hps_v2_1", {"dtype": "bfloat16"}, 1).weight_bytes < 0.51 * one.weight_bytes
    assert reward_cost("flicker", {}, 16).peak_bytes == pytest.approx(
        2 * reward_cost("flicker", {}, 8).peak_bytes, rel=1e-6
    )
    assert reward_cost("flicker", {}, 2) == reward_cost("flicker", {}, 8), "never less than what was measured"
    assert reward_cost("nano_verifier", {}, 1) is None


def test_a_chunk_of_frames_bounds_the_peak_and_takes_time():
    for name, chunk in (("motion_degree", 7), ("hps_v2_1", 8)):  # seven pairs are of eight frames
        eight, whole = reward_cost(name, {}, 8), reward_cost(name, {}, 41)
        chunked = reward_cost(name, {"chunk": chunk}, 41)
        assert chunked.peak_bytes == eight.peak_bytes < 0.3 * whole.peak_bytes
        assert chunked.seconds == pytest.approx(4 / 3 * whole.seconds)
        assert reward_cost(name, {"chunk": 99}, 8).peak_bytes == eight.peak_bytes
    assert reward_cost("video_align", {"chunk": 1}, 16) == reward_cost("video_align", {}, 16), "videos"


@pytest.mark.parametrize(
    ("name", "settings", "decoded", "scored"),
    [
        ("hps_v2_1", {}, 1, 1),
        ("hps_v2_1", {"frames": "all", "num_frames": 8}, 33, 8),
        ("hps_v2_1", {"frames": 5}, 5, 5),
        ("hps_v2_1", {"frames": "all", "num_frames": "random 4"}, 33, 4),
        ("hps_v2_1", {"frames": "all", "num_frames": "8 fps"}, 33, 11),
        ("hps_v2_1", {"frames": "all", "num_frames": "0.5 fps"}, 33, 1),
        ("hps_v2_1", {"frames": "all", "num_frames": "2.5 fps"}, 33, 4),
        ("viclip", {}, 33, 8),
        ("video_score", {"max_frames": 8}, 33, 8),
        ("video_align", {}, 33, 3),
        ("flicker", {}, 33, 33),
        ("flicker", {"frames": 99}, 33, 33),
    ],
)
def test_frames_that_are_decoded_and_scored(name, settings, decoded, scored):
    assert decoded_frames(name, settings, 33) == decoded
    assert scored_frames(name, settings, decoded, fps=24) == scored
