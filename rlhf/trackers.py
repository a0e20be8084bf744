"""The trackers that `report_to` names, through accelerate, and sample videos in the form that each can show."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image

from rlhf.config import RewardGradientConfig

PROJECT = "contentv-rlhf"
GIF_SIDE, GIF_RATE = 320, 12  # pixels of the longer side, frames a second: at most, since a GIF is hardly compressed


@contextmanager
def tracked(accelerator: Accelerator, args: RewardGradientConfig) -> Iterator[None]:
    """Inside, the trackers that args name run, as `accelerator.trackers`."""
    if args.report_to:
        accelerator.init_trackers(PROJECT, config=_plain(args))
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # end_training would take the process group down as well
            tracker.finish()
        accelerator.trackers = []  # nor shall it finish them twice


def _plain(args: RewardGradientConfig) -> dict:
    """Settings as trackers take them: numbers and strings."""
    return {k: v if isinstance(v, int | float | str | bool) else json.dumps(v) for k, v in vars(args).items()}


@dataclass(frozen=True)
class Clip:
    """A sample video: its file, its prompt and its pixels, uint8."""

    path: Path
    prompt: str
    video_CTHW: torch.Tensor
    fps: int

    @property
    def tag(self) -> str:
        """The same at each step, so that a tracker shows how the samples of a prompt change."""
        return f"samples/{self.path.stem}"

    def gif(self) -> bytes:
        """The video as an animated GIF that repeats, smaller and slower where it is large."""
        every = -(-self.fps // GIF_RATE)
        frames = [Image.fromarray(frame.numpy()) for frame in self.video_CTHW[:, ::every].permute(1, 2, 3, 0)]
        for frame in frames:
            frame.thumbnail((GIF_SIDE, GIF_SIDE))
        file = io.BytesIO()
        duration = 1000 * every / self.fps  # milliseconds a frame
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
        return file.getvalue()


def show(accelerator: Accelerator, step: int, clips: list[Clip]) -> None:
    """Show sample videos in those of its trackers that can; the others have the metrics, and samples/ the files."""
    for tracker in accelerator.trackers:
        if tracker.name in SHOWN_BY and clips:
            SHOWN_BY[tracker.name](tracker, step, clips)


def _in_tensorboard(tracker, step: int, clips: list[Clip]) -> None:
    """Among its images, which may be GIFs; its own add_video makes such ones too, with moviepy."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    for clip in clips:
        height, width = clip.video_CTHW.shape[2:]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=clip.gif())
        summary = Summary(value=[Summary.Value(tag=clip.tag, image=image)])
        tracker.writer.file_writer.add_summary(summary, step)
    tracker.log({clip.tag: clip.prompt for clip in clips}, step=step)  # as text


def _in_wandb(tracker, step: int, clips: list[Clip]) -> None:
    import wandb

    tracker.log({clip.tag: wandb.Video(str(clip.path), caption=clip.prompt) for clip in clips}, step=step)


def _in_trackio(tracker, step: int, clips: list[Clip]) -> None:
    import trackio

    tracker.log({clip.tag: trackio.Video(str(clip.path), caption=clip.prompt) for clip in clips}, step=step)


def _in_swanlab(tracker, step: int, clips: list[Clip]) -> None:
    import swanlab  # it takes GIFs alone, docs.swanlab.cn/en/api/py-video.html

    tracker.log({clip.tag: swanlab.Video(io.BytesIO(clip.gif()), caption=clip.prompt) for clip in clips}, step=step)


SHOWN_BY: dict[str, Callable] = {
    "tensorboard": _in_tensorboard,
    "wandb": _in_wandb,
    "trackio": _in_trackio,
    "swanlab": _in_swanlab,
}
