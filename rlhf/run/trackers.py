"""The trackers of `report_to`, through accelerate, and sample videos in their formats."""

import importlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image

from rlhf.config import RewardGradientConfig

PROJECT = "contentv-rlhf"
VIDEO_LIBRARIES = ("wandb", "trackio", "swanlab")
GIF_SIDE, GIF_RATE = 320, 12  # at most, as GIFs are large: pixels of the longer side, frames a second


@contextmanager
def run_trackers(accelerator: Accelerator, args: RewardGradientConfig) -> Iterator[None]:
    """Start the trackers of `report_to` as `accelerator.trackers`; finish them after the block."""
    if args.report_to:
        accelerator.init_trackers(PROJECT, config=_tracker_config(args))
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # end_training would also end the process group
            tracker.finish()
        accelerator.trackers = []  # so that end_training does not finish them twice


def _tracker_config(args: RewardGradientConfig) -> dict:
    """Return the settings as numbers and strings, which all trackers accept."""
    plain = lambda value: value if isinstance(value, int | float | str | bool) else json.dumps(value)
    return {name: plain(value) for name, value in vars(args).items()}


@dataclass(frozen=True)
class Clip:
    """A sample video: its file, its prompt and its pixels, uint8."""

    path: Path
    prompt: str
    video_CTHW: torch.Tensor
    fps: int

    @property
    def tag(self) -> str:
        """Return the tag, the same at each step, so that trackers show how samples change."""
        return f"samples/{self.path.stem}"

    def gif(self) -> bytes:
        """Return a repeating GIF with at most GIF_SIDE pixels and GIF_RATE frames a second."""
        every = -(-self.fps // GIF_RATE)
        pixels_THWC = self.video_CTHW[:, ::every].permute(1, 2, 3, 0)
        frames = [Image.fromarray(frame.numpy()) for frame in pixels_THWC]
        for frame in frames:
            frame.thumbnail((GIF_SIDE, GIF_SIDE))
        file, duration = io.BytesIO(), 1000 * every / self.fps  # milliseconds a frame
        options = {"append_images": frames[1:], "duration": duration, "loop": 0}
        frames[0].save(file, "GIF", save_all=True, **options)
        return file.getvalue()


def show_samples(accelerator: Accelerator, step: int, clips: list[Clip]) -> None:
    """Show sample videos in the trackers that can show videos; the others get the metrics only."""
    for tracker in accelerator.trackers if clips else []:
        if tracker.name == "tensorboard":
            _show_in_tensorboard(tracker, step, clips)
        elif tracker.name in VIDEO_LIBRARIES:
            _show_in_library(tracker, step, clips)


def _show_in_tensorboard(tracker, step: int, clips: list[Clip]) -> None:
    """Log GIFs as images, which needs no moviepy, unlike TensorBoard's add_video."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    for clip in clips:
        height, width = clip.video_CTHW.shape[2:]
        gif = {"colorspace": 3, "encoded_image_string": clip.gif()}
        image = Summary.Image(height=height, width=width, **gif)
        summary = Summary(value=[Summary.Value(tag=clip.tag, image=image)])
        tracker.writer.file_writer.add_summary(summary, step)
    tracker.log({clip.tag: clip.prompt for clip in clips}, step=step)  # as text


def _show_in_library(tracker, step: int, clips: list[Clip]) -> None:
    """Log videos with the library's `Video` class: files, or GIFs for swanlab.

    It takes no other kind, docs.swanlab.cn/en/api/py-video.html.
    """
    make = importlib.import_module(tracker.name).Video
    data = lambda clip: io.BytesIO(clip.gif()) if tracker.name == "swanlab" else str(clip.path)
    tracker.log({clip.tag: make(data(clip), caption=clip.prompt) for clip in clips}, step=step)
