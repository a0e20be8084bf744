"""Trackers that are no dependency, each for a whole run, offline: numbers and videos on disk.

They are skipped where the package is missing: pip install 'contentv-rlhf[trackers]'.
"""

import json
import sqlite3
import struct
from contextlib import closing
from pathlib import Path

import pytest
import torch
from PIL import Image
from stored import stored_frames
from tiny import tiny_pipeline
from toy_rewards import PROMPTS, redness

from rlhf.trainer import RewardGradientTrainer

MISSING = "is not installed: pip install 'contentv-rlhf[trackers]' to run its test"


@pytest.fixture
def train(make_args, tmp_path, monkeypatch):
    """Train two steps with a tracker; return the logged rewards and the three sample videos."""
    monkeypatch.chdir(tmp_path)

    def run(name):
        pytest.importorskip(name, reason=f"{name} {MISSING}")
        settings = {"max_steps": 2, "sample_steps": 1, "num_sample_prompts": 1, "num_diversity_prompts": 0}
        args = make_args(report_to=[name], **settings)
        trainer = RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS, PROMPTS[:1])
        trainer.train()
        assert trainer.accelerator.trackers == [], "finished"
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        return [row["reward"] for row in rows], sorted((tmp_path / "run").glob("samples/step-*/00.mp4"))

    return run


def one(pattern) -> Path:
    (found,) = Path().glob(pattern)
    return found


def test_wandb(train, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    rewards, samples = train("wandb")
    kept = Path().glob("wandb/offline-run-*/files/media/videos/samples/00_*.mp4")
    assert {path.read_bytes() for path in kept} == {path.read_bytes() for path in samples}
    log = one("wandb/offline-run-*/*.wandb").read_bytes()
    for reward in rewards:
        assert f"{reward:.10}".encode() in log
    assert PROMPTS[0].encode() in log


def test_trackio(train, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    rewards, samples = train("trackio")
    with closing(sqlite3.connect(one("trackio/*.db"))) as base:
        rows = [(step, json.loads(text)) for step, text in base.execute("select step, metrics from metrics")]
    assert [(step, row["reward"]) for step, row in rows if "reward" in row] == list(enumerate(rewards, 1))
    shown = [(step, row["samples/00"]) for step, row in rows if "samples/00" in row]
    assert [step for step, _ in shown] == [0, 1, 2]
    assert {video["caption"] for _, video in shown} == {PROMPTS[0]}
    files = [tmp_path / "trackio" / "media" / video["file_path"] for _, video in shown]
    assert all(torch.equal(stored_frames(a), stored_frames(b)) for a, b in zip(files, samples, strict=True))


def test_swanlab(train, monkeypatch):
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    rewards, samples = train("swanlab")
    gifs = sorted(Path().glob("swanlog/run-*/media/image/*.gif"))
    assert [Image.open(path).n_frames for path in gifs] == [5] * len(samples)
    log = one("swanlog/run-*/*.swanlab").read_bytes()
    for reward in rewards:
        assert struct.pack("<d", reward) in log
    assert PROMPTS[0].encode() in log


def test_moviepy_2_beside_tensorboard_changes_nothing(train):
    """PyTorch's add_video drops videos with moviepy 2, which has no moviepy.editor."""
    pytest.importorskip("moviepy", reason="moviepy is not installed: pip install moviepy to run TensorBoard beside it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("tensorboard")
    images = EventAccumulator("run/trackers/contentv-rlhf", {"images": 0}).Reload().Images("samples/00")
    assert [image.step for image in images] == [0, 1, 2]
