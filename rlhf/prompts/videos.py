"""Real videos with captions, for the setting `anchor_data`: read, and checked before any weight.

They are read as eval/score.py reads them (`rlhf.evaluation.video_set`, `rewards.cli.files`).
"""

import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rewards.cli.files import read_video
from rewards.score_cache import content_sha256, default_cache_folder
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.evaluation.video_set import Video, read_set, relative_name, require_files
from rlhf.method.options import is_offline
from rlhf.prompts import load_prompts
from rlhf.prompts.files import as_prompt
from rlhf.types import Prompt, fields_of

NUM_BUILT_IN = 4096  # prompts that are drawn of a built-in set
RATE_TOLERANCE = 0.01  # 23.976 frames a second count as 24


class ClipSize(NamedTuple):
    """Size of a run's videos: pixels, frames, and frames per second."""

    width: int
    height: int
    num_frames: int
    fps: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.num_frames}@{self.fps}"


def clip_size(args: RewardGradientConfig, fps: int) -> ClipSize:
    """Return the size of a run's videos. args: with all sampling keys set."""
    return ClipSize(args.width, args.height, args.num_frames, fps)


def read_videos(args: RewardGradientConfig) -> list[Video]:
    """Return the videos of `anchor_data`, [] without one; a caption's row has its "file".

    Raises ValueError for a folder, list or caption that cannot be read, and for absent files.
    """
    if args.anchor_data is None:
        return []
    folder = Path(args.anchor_data)
    videos = read_set(folder)
    require_files(videos)
    return [dataclasses.replace(video, prompt=_caption(folder, video)) for video in videos]


def _caption(folder: Path, video: Video) -> Prompt:
    """Return the caption as a prompt with its "file". Raises ConfigError for an empty one."""
    name = relative_name(folder, video.path)
    caption = as_prompt({**fields_of(video.prompt), "prompt": str(video.prompt), "file": name}, str(video.path))
    caption.read.add("file")
    return caption


def load_train_prompts(args: RewardGradientConfig) -> list[str]:
    """Return the prompts to train on: those of `prompts`, or the captions of an offline run."""
    if is_offline(args):
        return [video.prompt for video in read_videos(args)]
    return load_prompts(args.prompts, args.base_dir, NUM_BUILT_IN, args.seed)


def entry_folder(content: str) -> Path:
    """Return the folder of a video's cached latents. content: the digest of its file."""
    return default_cache_folder("latents") / content


def video_problems(args: RewardGradientConfig, fps: int) -> Iterator[str]:
    """Yield one problem of all videos of `anchor_data`. fps: the model's frames per second."""
    size = clip_size(args, fps)
    try:
        videos = read_videos(args)
    except ConfigError as error:
        yield from (f"anchor_data: {problem}" for problem in error.problems)
        return
    except (ValueError, OSError) as error:
        yield f"anchor_data: {error}"
        return
    found = [problem for video in videos if (problem := _misfit(video.path, size))]
    if found:
        expected = f"expected {size.width}x{size.height} pixels, at least {size.num_frames} frames, {fps} a second"
        cure = (
            f"ffmpeg -i IN -vf fps={fps},scale={size.width}:{size.height} OUT.mp4 converts one; leave shorter ones out"
        )
        yield f"anchor_data: {found[0]} ({len(found)} of {len(videos)} videos do not fit), {expected}; {cure}"


def _misfit(path: Path, size: ClipSize) -> str | None:
    """Return why a run can't learn from a file, None if it can."""
    try:
        wrong = _wrong_content(path, size, content_sha256(path))
    except (ValueError, OSError) as error:
        return str(error)
    return wrong and f"{path}: got {wrong}"


@cache  # a command checks its settings, and the trainer does so again
def _wrong_content(path: Path, size: ClipSize, content: str) -> str | None:
    """Return the size, length or frame rate that does not fit, in words; None if the video fits.

    A video whose latents are cached fits, and is not read.
    """
    if any(entry_folder(content).glob(f"{size}-*")):
        return None
    video = read_video(path, size.num_frames, size.fps)
    frames, height, width = video.pixels_BCTHW.shape[2:]
    if (width, height) != (size.width, size.height):
        return f"{width}x{height} pixels"
    if frames < size.num_frames:
        return f"{frames} frames"
    if "times" in video.info:
        return "frames of uneven length"
    rate = video.info.get("fps", size.fps)
    return f"{rate:g} frames a second" if abs(rate / size.fps - 1) > RATE_TOLERANCE else None
