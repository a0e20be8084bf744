"""`python -m rewards.score` on real files: the table, the JSON, files that fail, errors."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import check_spec, load_reward
from rewards.cli.files import read_video
from rewards.score import main, parse_score_args, resolve_prompts
from rewards.score_cache import score_conditions
from rlhf.run.video import write_video

ROOT = Path(__file__).parents[2]
FAULTS = ROOT / "tests" / "data" / "faults"
SQUARES = np.kron(np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3)), np.ones((1, 16, 16, 1))).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five frames of coloured squares as mp4 and gif at 5 fps; the first also as png and jpg."""
    folder = tmp_path_factory.mktemp("files")
    write_video(folder / "clip.mp4", torch.from_numpy(SQUARES).permute(3, 0, 1, 2), fps=5)
    images = [Image.fromarray(frame) for frame in SQUARES]
    images[0].save(folder / "clip.gif", save_all=True, append_images=images[1:], duration=200)
    images[0].save(folder / "picture.png")
    images[0].save(folder / "picture.JPG")
    (folder / "broken.mp4").write_bytes(b"not a video")
    (folder / "words.txt").write_text("no video, either")
    (folder / "frames").mkdir()
    for i, image in enumerate(images):
        image.save(folder / "frames" / f"{i}.png")
    return folder


def test_several_rewards_on_several_files(folder, tmp_path, capsys):
    files = [str(folder / name) for name in ("clip.mp4", "clip.gif")]
    prompts = ["--prompt", "a red circle moving left", "--prompt", "a blue square moving up"]
    arguments = ["--reward", "flicker", "--reward", "nano_clip", "--json", str(tmp_path / "scores.json"), *prompts]
    assert main([*files, *arguments, "--kwargs", '{"nano_clip": {"num_frames": "random 2"}}']) == 0
    rows = json.loads((tmp_path / "scores.json").read_text())
    clip = load_reward("nano_clip", num_frames="random 2")
    for row, file, prompt in zip(rows, files, prompts[1::2], strict=True):
        video = read_video(file)
        assert (row["file"], row["prompt"], row["frames"], row["fps"]) == (file, prompt, 5, 5.0)
        flicker = load_reward("flicker")(video.pixels_BCTHW, [""]).item()
        assert row["scores"]["flicker"] == pytest.approx(flicker, abs=1e-6)
        expected = clip(video.pixels_BCTHW, [prompt], seed=0, step=0, **video.info).item()
        assert row["scores"]["nano_clip"] == pytest.approx(expected, abs=1e-5)
    head, _, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["file", "frames", "flicker", "nano_clip"]
    assert first.split() == [files[0], "5", *(f"{value:.5g}" for value in rows[0]["scores"].values())]
    assert rows[0]["scores"] != rows[1]["scores"]
    assert second.startswith(files[1])


def test_only_the_frames_that_are_wanted_are_read(folder, capsys):
    clip = str(folder / "clip.mp4")
    assert main([clip, "--reward", "nano_clip", "--prompt", "a", "--kwargs", '{"nano_clip": {"frames": 3}}']) == 0
    assert main([clip, "--reward", "flicker", "--max_frames", "2"]) == 0
    frames = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith(clip)]
    assert frames == ["3", "2"]


def test_a_reward_of_ones_own_and_one_prompt_for_all(folder, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def words(video, prompts, **info):\n    return video.mean((1, 2, 3, 4)) * 0 + len(prompts[0])\n"
    )
    files = [str(folder / name) for name in ("picture.png", "picture.JPG")]
    assert main([*files, "--reward", f"{tmp_path}/mine.py:words", "--prompt", "12345"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[2:]] == ["5", "5"]


@pytest.fixture
def asked(tmp_path):
    """A reward that notes the info of each call."""
    (tmp_path / "ask.py").write_text(
        "calls = []\ndef ask(video, prompts, **info):\n    calls.append(info)\n"
        "    return video.mean((1, 2, 3, 4)) * 0 + info['fps']\n"
    )
    return f"{tmp_path}/ask.py:ask"


def test_rewards_are_told_rate_and_times(folder, asked, tmp_path):
    command = [
        str(FAULTS / "vfr.mp4"),
        str(folder / "frames"),
        "--fps",
        "12",
        "--reward",
        asked,
        "--reward",
        "smoothness",
    ]
    assert main([*command, "--json", str(tmp_path / "scores.json")]) == 0
    first, second = json.loads((tmp_path / "scores.json").read_text())
    assert (first["frames"], first["fps"], first["scores"]["ask"]) == (9, *[pytest.approx(9 / 4.625)] * 2)
    assert (second["frames"], second["fps"], second["scores"]["ask"]) == (5, 12, 12)
    video = read_video(FAULTS / "vfr.mp4")
    smooth = load_reward("smoothness")(video.pixels_BCTHW, [""], **video.info).item()
    assert first["scores"]["smoothness"] == pytest.approx(smooth, abs=1e-6)
    assert abs(smooth - load_reward("smoothness")(video.pixels_BCTHW, [""]).item()) > 1e-4


def test_the_others_are_scored_and_what_fails_is_listed(folder, tmp_path, capsys):
    files = [str(folder / name) for name in ("broken.mp4", "clip.mp4", "picture.png", "clip.gif", "words.txt")]
    command = [*files, "--reward", "flicker", "--json", str(tmp_path / "scores.json")]
    assert main(command) == 1
    out, error = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[2:]] == [files[1], files[3]]
    broken, picture, words, last = error.splitlines()
    assert broken.startswith(f"rewards.score: {files[0]}: got a file that can't be decoded")
    assert picture.startswith(f"rewards.score: {files[2]}: reward 'flicker': got 1 frame(s)")
    assert words.startswith(f"rewards.score: {files[4]}: got '.txt', expected one of .mp4")
    assert last == "rewards.score: 3 of 5 files were not scored"
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert [row["file"] for row in rows] == files
    assert [f"rewards.score: {row['error']}" for row in rows if "error" in row] == [broken, picture, words]

    assert main([*command, "--strict"]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.splitlines() == [words], "it stops at the first, before rewards are loaded"


def test_a_truncated_video_is_scored_if_allowed_and_said(tmp_path, capsys):
    path = str(FAULTS / "big_cut.mp4")
    command = [path, "--reward", "flicker", "--json", str(tmp_path / "scores.json")]
    assert main(command) == 1
    assert "got 18 of 32 frames" in capsys.readouterr().err
    assert main([*command, "--allow_truncated"]) == 0
    assert capsys.readouterr().err == f"rewards.score: {path}: scored 18 of 32 frames\n"
    (row,) = json.loads((tmp_path / "scores.json").read_text())
    assert (row["frames"], row["missing"]) == (18, "18 of 32 frames")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["clip.mp4", "--reward", "clip_score"], "reward 'clip_score': got no prompt; expected a description of"),
        (["clip.mp4", "--reward", "flicker", "--prompt", "a", "--prompt", "b"], "--prompt: got 2, expected 1 or 1"),
        (["absent.mp4", "--reward", "flicker"], "got no file there"),
        (["clip.mp4", "--reward", "a.py:Mine", "--reward", "b.py:Mine"], "--reward: got 'Mine' twice, expected each"),
        (["clip.mp4", "--reward", "flickr"], "The nearest name is 'flicker'"),
        (["picture.png", "--reward", "flicker"], r"reward 'flicker': got 1 frame(s); expected at least 2"),
        (["frames", "--reward", "flicker"], "expected a file, or numbered pictures and their frame rate"),
        (["clip.mp4", "--reward", "flicker", "--kwargs", '{"smooth": {}}'], "--kwargs: got 'smooth': {}, expected"),
        (["clip.mp4", "--reward", "flicker", "--kwargs", '{"flicker": 3}'], "--kwargs: got 'flicker': 3, expected"),
        (["clip.mp4", "--reward", "flicker", "--kwargs", '{"flicker": {"frame": 3}}'], "nearest name is 'frames'"),
    ],
)
def test_what_is_missing_or_wrong_is_told_in_a_line(folder, arguments, told, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("rewards.score: ")
    assert told in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("flag", ["--max_frames=0", "--max_frames=-1", "--max_frames=many", "--fps=0", "--fps=nan"])
def test_numbers_that_are_none_are_refused(folder, flag, capsys):
    with pytest.raises(SystemExit):
        main([str(folder / "clip.mp4"), "--reward", "flicker", flag])
    assert f"got {flag.split('=')[1]!r}; expected" in capsys.readouterr().err


def test_the_command_of_the_guide_is_understood():
    guide = (ROOT / "docs" / "rewards.md").read_text()
    (command,) = re.findall(r"^python -m rewards.score (.*)$", guide, re.MULTILINE)
    arguments = parse_score_args(shlex.split(command))
    assert [str(path) for path in arguments.files] == ["video.mp4", "other.gif"]
    for name in arguments.rewards:
        check_spec(name)
    assert resolve_prompts(arguments.files, arguments.prompts, arguments.rewards) == ["a red kite"] * 2


def test_it_runs_as_a_module(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["score", str(folder / "clip.gif"), "--reward", "smoothness"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("rewards.score", run_name="__main__")
    assert ended.value.code == 0
    assert "smoothness" in capsys.readouterr().out


def test_scores_by_other_weights_are_not_of_equal_conditions(tmp_path):
    weights = tmp_path / "head.pth"
    weights.write_bytes(b"one")
    before = score_conditions("aesthetic", {"weights": str(weights)}, None)
    assert score_conditions("aesthetic", {"weights": str(weights)}, None) == before
    weights.write_bytes(b"two")
    assert score_conditions("aesthetic", {"weights": str(weights)}, None) != before


def test_scores_that_find_no_room_on_the_disk_are_shown_and_the_place_is_named(folder, tmp_path, capsys, file_limit):
    command = [str(folder / "clip.gif"), "--reward", "flicker", "--json", str(tmp_path / "scores.json")]
    with file_limit(10):
        assert main(command) == 1
    told = capsys.readouterr()
    assert "clip.gif" in told.out
    assert "--json: got [Errno 27] File too large" in told.err
