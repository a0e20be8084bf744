"""Videos of a model for prompts and seeds: one file each, whole or absent, so that an interrupted job goes on.

The noise of a video comes from its seed and its prompt alone: it is the same for every model, whatever else is made
with it and on however many devices. So models can be compared pair by pair.

Shape legend: B batch, C channels, T frames, H height, W width.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from rlhf.adapter.merge import ADAPTER_FILE, load_adapter, merged
from rlhf.contentv.files import SamplingDefaults
from rlhf.contentv.loading import load_pipeline
from rlhf.contentv.pipeline import ContentVPipeline
from rlhf.device import generator
from rlhf.lora_scale import check_scale, scaled
from rlhf.reading import read_object
from rlhf.tracking import to_uint8, write_video
from rlhf.video_set import Video

SETTINGS_FILE = "generate.json"


@dataclass(frozen=True)
class Variant:
    """Which model makes the videos.

    model   "nano", a folder in diffusers layout (also one exported with an adapter merged) or a hub id
    lora    folder of an adapter, such as RUN/adapter; None: the model as it is
    merge   add the adapter to the weights first, as an export does, instead of computing it beside them
    scale   scale of the adapter
    """

    model: str = "nano"
    lora: Path | None = None
    merge: bool = False
    scale: float = 1.0

    def check(self) -> None:
        """Raise ValueError for an adapter that is not there or can't be used, before anything is loaded."""
        check_scale(self.scale)
        if self.lora is None:
            if self.merge or self.scale != 1:
                got = "merge" if self.merge else f"scale={self.scale}"
                raise ValueError(f"{got}: got no adapter, expected one to apply it to; name its folder")
            return
        if not (self.lora / ADAPTER_FILE).is_file():
            raise ValueError(f"{self.lora}: got no {ADAPTER_FILE}, expected an adapter such as RUN/adapter; correct it")

    @contextmanager
    def open(self, device: torch.device) -> Iterator[ContentVPipeline]:
        """The pipeline on the device, for use inside."""
        pipe = load_pipeline(self.model, device=device)
        pipe.set_progress_bar_config(disable=True)
        if self.lora:
            load_adapter(pipe.transformer, self.lora)
        if self.merge:
            with merged(pipe.transformer, self.scale) as plain:
                pipe.transformer = plain
                yield pipe
            return
        with scaled(pipe.transformer, self.scale):
            yield pipe

    def identity(self) -> dict:
        """What tells this variant from others, the adapter by its content."""
        content = hashlib.sha256((self.lora / ADAPTER_FILE).read_bytes()).hexdigest() if self.lora else None
        return {"model": str(self.model), "adapter_sha256": content, "merge": self.merge, "scale": self.scale}


def generate(
    variant: Variant, videos: list[Video], sampling: SamplingDefaults, accelerator: Accelerator, batch_size: int
) -> int:
    """Make those of the videos that are not there yet; all processes share the work. How many this process made."""
    own = videos[accelerator.process_index :: accelerator.num_processes]
    todo = [video for video in own if not video.path.exists()]
    if todo:
        with variant.open(accelerator.device) as pipe, _bar(own, todo, accelerator) as bar:
            for batch in (todo[i : i + batch_size] for i in range(0, len(todo), batch_size)):
                for video, pixels_TCHW in zip(batch, sample(pipe, batch, sampling), strict=True):
                    write_whole(video.path, pixels_TCHW, sampling.fps)
                bar.update(len(batch))
    accelerator.wait_for_everyone()
    return len(todo)


def _bar(own: list[Video], todo: list[Video], accelerator: Accelerator) -> tqdm:
    """Over this process's share, which on the main process stands for all of them."""
    done = len(own) - len(todo)
    return tqdm(total=len(own), initial=done, desc="generate", unit="video", disable=not accelerator.is_main_process)


def sample(pipe: ContentVPipeline, videos: list[Video], sampling: SamplingDefaults) -> torch.Tensor:
    """(B, T, 3, H, W) uint8 on the CPU."""
    noise = [generator("video", video.seed, video.prompt) for video in videos]
    prompts = [video.prompt for video in videos]
    frames = pipe(prompts, generator=noise, output_type="pt", **sampling.call_arguments()).frames
    return to_uint8(frames)


def write_whole(path: Path, video_TCHW: torch.Tensor, fps: int) -> None:
    """Write a video of uint8 under another name first: under its own it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{hashlib.sha1(path.name.encode()).hexdigest()[:12]}.mp4")
    write_video(unfinished, video_TCHW.transpose(0, 1), fps)
    unfinished.replace(path)


def check_settings(folder: Path, variant: Variant, sampling: SamplingDefaults) -> None:
    """Raise ValueError if the videos in the folder were made otherwise."""
    path, now = folder / SETTINGS_FILE, _settings(variant, sampling)
    before = read_object(path) if path.is_file() else now
    for key in now:
        if before.get(key) != now[key]:
            raise ValueError(
                f"{path}: got videos made with {key}={before.get(key)!r}, expected {now[key]!r} to go on with them; "
                "choose another output folder, or set it back"
            )


def write_settings(folder: Path, variant: Variant, sampling: SamplingDefaults) -> None:
    """Write how the videos of a folder are made."""
    (folder / SETTINGS_FILE).write_text(json.dumps(_settings(variant, sampling), indent=2) + "\n")


def _settings(variant: Variant, sampling: SamplingDefaults) -> dict:
    return variant.identity() | asdict(sampling)
