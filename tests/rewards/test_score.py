"""`python -m rewards.score` on real files: each kind of file, the table, the JSON, errors."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils import export_to_video
from PIL import Image

from rewards import check_spec, load_reward
from rewards.cli.files import read_video
from rewards.score import main, parse_score_args, resolve_prompts

ROOT = Path(__file__).parents[2]
SQUARES = np.kron(np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3)), np.ones((1, 16, 16, 1))).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five frames of coloured squares as mp4 and gif at 5 fps; the first also as png and jpg."""
    folder = tmp_path_factory.mktemp("files")
    images = [Image.fromarray(frame) for frame in SQUARES]
    export_to_video(images, str(folder / "clip.mp4"), fps=5, quality=10)
    images[0].save(folder / "clip.gif", save_all=True, append_images=images[1:], duration=200)
    images[0].save(folder / "picture.png")
    images[0].save(folder / "picture.JPG", "JPEG", quality=95, subsampling=0)
    images[0].convert("LA").save(folder / "grey.png")
    (folder / "broken.mp4").write_bytes(b"not a video")
    (folder / "broken.png").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("text")
    return folder


# ---------------------------------------- reading


@pytest.mark.parametrize(
    ("name", "frames", "fps", "tolerance"),
    [("clip.mp4", 5, 5.0, 8), ("clip.gif", 5, 5.0, 12), ("picture.png", 1, None, 0), ("picture.JPG", 1, None, 3)],
)
def test_what_is_read(folder, name, frames, fps, tolerance):
    video, rate = read_video(folder / name)
    assert video.shape == (1, 3, frames, 64, 96)
    assert video.dtype == torch.float32
    assert rate == fps
    expected = torch.from_numpy(SQUARES[:frames]).permute(3, 0, 1, 2)[None]
    assert (video * 255 - expected).abs().mean() <= tolerance, "mean grey levels"


def test_leading_frames_and_grey_pictures(folder):
    assert read_video(folder / "clip.mp4", 2)[0].shape[2] == 2
    assert torch.equal(read_video(folder / "clip.gif", 2)[0], read_video(folder / "clip.gif")[0][:, :, :2])
    assert read_video(folder / "grey.png")[0].shape == (1, 3, 1, 64, 96)


def test_a_turned_photograph_is_upright(folder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    Image.fromarray(SQUARES[0]).save(tmp_path / "turned.png", exif=exif)
    upright = torch.rot90(read_video(folder / "picture.png")[0], -1, (3, 4))
    assert torch.equal(read_video(tmp_path / "turned.png")[0], upright)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("absent.mp4", "got no file there"),
        ("notes.txt", "got '.txt', expected one of .mp4"),
        ("broken.mp4", "can't be decoded"),
        ("broken.png", "can't be decoded"),
    ],
)
def test_files_that_can_not_be_read(folder, name, told):
    with pytest.raises(ValueError, match=told) as caught:
        read_video(folder / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------- scoring


def test_several_rewards_on_several_files(folder, tmp_path, capsys):
    files = [str(folder / name) for name in ("clip.mp4", "clip.gif")]
    prompts = ["--prompt", "a red circle moving left", "--prompt", "a blue square moving up"]
    arguments = ["--reward", "flicker", "--reward", "nano_clip", "--json", str(tmp_path / "scores.json"), *prompts]
    assert main([*files, *arguments, "--kwargs", '{"nano_clip": {"num_frames": "random 2"}}']) == 0
    rows = json.loads((tmp_path / "scores.json").read_text())
    clip = load_reward("nano_clip", num_frames="random 2")
    for row, file, prompt in zip(rows, files, prompts[1::2], strict=True):
        video, fps = read_video(file)
        assert (row["file"], row["prompt"], row["frames"], row["fps"]) == (file, prompt, 5, 5.0)
        assert row["scores"]["flicker"] == pytest.approx(load_reward("flicker")(video, [""]).item(), abs=1e-6)
        expected = clip(video, [prompt], fps=fps, seed=0, step=0).item()
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


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["clip.mp4", "--reward", "clip_score"], "reward 'clip_score': got no prompt; expected a description of"),
        (["clip.mp4", "--reward", "flicker", "--prompt", "a", "--prompt", "b"], "--prompt: got 2, expected 1 or 1"),
        (["absent.mp4", "--reward", "flicker"], "got no file there"),
        (["clip.mp4", "--reward", "a.py:Mine", "--reward", "b.py:Mine"], "--reward: got 'Mine' twice, expected each"),
        (["clip.mp4", "--reward", "flickr"], "The nearest name is 'flicker'"),
        (["picture.png", "--reward", "flicker"], r"reward 'flicker': got 1 frame(s); expected at least 2"),
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


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_a_number_of_frames_that_is_none_is_refused(folder, count, capsys):
    with pytest.raises(SystemExit):
        main([str(folder / "clip.mp4"), "--reward", "flicker", f"--max_frames={count}"])
    assert f"got {count!r}; expected a number of frames, 1 or more" in capsys.readouterr().err


def test_the_command_of_the_guide_is_understood():
    guide = (ROOT / "docs" / "rewards.md").read_text()
    (command,) = re.findall(r"^python -m rewards.score (.*)$", guide, re.MULTILINE)
    arguments = parse_score_args(shlex.split(command))
    assert [str(path) for path in arguments.files] == ["video.mp4", "other.gif"]
    for name in arguments.rewards:
        check_spec(name)
    assert resolve_prompts(arguments.files, arguments.prompts, arguments.rewards) == ["a red kite"] * 2


def test_it_runs_as_a_module(folder):
    command = [sys.executable, "-m", "rewards.score", str(folder / "clip.gif"), "--reward", "smoothness"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "smoothness" in done.stdout
