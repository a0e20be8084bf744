"""Inputs that some arms of a study on nano share: a distilled head, and real videos.

They are made once, before any run, and kept in bench/runs/study.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from study_arms import HEAD, ROOT, VIDEOS

from rewards.models.latent_reward import read_facts
from rlhf.io import write_rows
from rlhf.nano import world
from rlhf.run.video import to_uint8

DISTIL = {"videos": 1024, "epochs": 4, "blocks": 3}
COUNT, FPS = 64, 8


def write_pictures(folder: Path, video_CTHW: torch.Tensor, fps: int) -> None:
    """Write a uint8 video as a folder of numbered pictures, which need no PyAV and lose nothing."""
    folder.mkdir(exist_ok=True)
    for i, frame in enumerate(video_CTHW.permute(1, 2, 3, 0).contiguous().numpy()):
        Image.fromarray(frame).save(folder / f"{i}.png")


def make_videos(folder: Path, ending: str = "", write: Callable = write_pictures) -> None:
    """Write captioned videos of nano's world and videos.jsonl, unless they are there.

    No combination is held out, and all captions are right. ending: of the videos' names.
    """
    if (folder / "videos.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    scenes = world.sample_scenes(COUNT, generator)
    captions = world.captions(scenes, generator)
    for i, video in enumerate(world.render(scenes)):
        write(folder / f"{i}{ending}", to_uint8(video), FPS)
    write_rows(folder / "videos.jsonl", [{"file": f"{i}{ending}", "prompt": text} for i, text in enumerate(captions)])


def make_head(path: Path, device: str, changes: dict | None = None) -> dict:
    """Distil nano_preference into a head, unless it is there; return what its file says of it."""
    if not path.exists():
        values = DISTIL | {"config": "nano", "device": device, "per_device_eval_batch_size": 16, "num_eval_prompts": 64}
        flags = [f"--{name}={value}" for name, value in (values | (changes or {})).items()]
        command = [sys.executable, "-m", "rewards.distill", "--head", str(path), *flags]
        if subprocess.run(command, cwd=ROOT).returncode:
            raise SystemExit("no head was distilled; see above")
    return read_facts(path).figures


def make_inputs(arms: list[dict], device: str) -> dict:
    """Make what some of the settings need; return what the result says about it."""
    if any("anchor_data" in settings for settings in arms):
        make_videos(ROOT / VIDEOS)
    if any(settings.get("method") == "prfl" for settings in arms):
        return {"head": make_head(ROOT / HEAD, device)}
    return {}
