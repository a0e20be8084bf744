"""Videos of a model for prompts and seeds: a file each, whole or absent, so that a job can resume.

The noise of a video depends on its seed and prompt only. It is the same for every model, batch size
and number of devices, so models can be compared pair by pair.

Shape legend: B batch, C channels, T frames, H height, W width.
"""

import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator

from rlhf.adapter.lora_file import read_adapter_bytes, read_lora_for
from rlhf.adapter.lora_weights import Lora
from rlhf.adapter.merge import apply_lora, check_lora_scale
from rlhf.device import generator
from rlhf.evaluation.video_set import Video
from rlhf.generator.files import SamplingDefaults, describe_model, model_sizes
from rlhf.generator.loading import load_pipeline
from rlhf.generator.pipeline import VideoPipeline
from rlhf.io import read_object, write_json, write_whole
from rlhf.run.metrics import progress_bar
from rlhf.run.video import finished_video, write_video
from rlhf.types import negative_of

SETTINGS_FILE = "generate.json"


@dataclass(frozen=True)
class Variant:
    """The model that makes the videos.

    Args:
        model: "nano", a folder in diffusers layout (such as a merged export) or a hub id.
        lora: an adapter, as `find_lora_file` finds it; None for the model alone.
        merge: add the adapter to the weights first, as an export does.
        scale: factor of the adapter.
    """

    model: str = "nano"
    lora: Path | None = None
    merge: bool = False
    scale: float = 1.0

    def check(self) -> None:
        """Raise ValueError for an adapter that does not fit, or a scale without one."""
        check_lora_scale(self.scale)
        if self.adapter is None and (self.merge or self.scale != 1):
            got = "merge" if self.merge else f"scale={self.scale}"
            raise ValueError(f"{got}: got no adapter, expected one to apply it to; name its folder")

    @cached_property
    def adapter(self) -> Lora | None:
        """Return the adapter, read for the model. Raises ValueError."""
        return self.lora and read_lora_for(model_sizes(self.model)["transformer"], self.lora)

    def load(self, device: torch.device, quiet: bool = False) -> VideoPipeline:
        """Return the pipeline on the device, with the adapter; unless quiet, print its effect."""
        pipe = load_pipeline(self.model, device=device)
        pipe.set_progress_bar_config(disable=True)
        if self.adapter:
            line = apply_lora(pipe.transformer, self.adapter, self.scale, self.merge)
            if not quiet:
                print(line)
        return pipe

    def identity(self) -> dict:
        """Return what identifies this variant; the adapter by its content."""
        content = read_adapter_bytes(self.lora) if self.lora else None
        digest = content and hashlib.sha256(content).hexdigest()
        settings = {"merge": self.merge, "scale": self.scale}
        model = {"model": str(self.model), "model_files": describe_model(self.model)}
        return model | {"adapter_sha256": digest} | settings


def generate(
    variant: Variant, videos: list[Video], sampling: SamplingDefaults, accelerator: Accelerator, batch_size: int
) -> int:
    """Make the videos whose files are absent, on all processes; return how many this one made."""
    own = videos[accelerator.process_index :: accelerator.num_processes]
    todo = [video for video in own if not video.path.exists()]
    if todo:
        done, shown = len(own) - len(todo), accelerator.is_main_process
        bar = progress_bar("generate", "video", len(own), shown, done)
        pipe = variant.load(accelerator.device, quiet=not shown)
        with bar:
            for batch in (todo[i : i + batch_size] for i in range(0, len(todo), batch_size)):
                for video, pixels_TCHW in zip(batch, sample(pipe, batch, sampling), strict=True):
                    save_video(video.path, pixels_TCHW, sampling.fps)
                bar.update(len(batch))
    accelerator.wait_for_everyone()
    return len(todo)


def sample(pipe: VideoPipeline, videos: list[Video], sampling: SamplingDefaults) -> torch.Tensor:
    """Return the videos as uint8 (B, T, 3, H, W) on the CPU."""
    noise = [generator("video", video.seed, video.prompt) for video in videos]
    prompts = [video.prompt for video in videos]
    arguments = sampling.call_arguments()
    arguments["negative_prompt"] = [negative_of(prompt, sampling.negative_prompt) for prompt in prompts]
    frames = pipe(prompts, generator=noise, output_type="pt", **arguments).frames
    return finished_video(frames)


def save_video(path: Path, video_TCHW: torch.Tensor, fps: int) -> None:
    """Write a uint8 video, whole or not at all."""
    with write_whole(path) as unfinished:
        write_video(unfinished, video_TCHW.transpose(0, 1), fps)


def check_settings(folder: Path, variant: Variant, sampling: SamplingDefaults, videos: list[Video]) -> None:
    """Raise ValueError if some of the videos are there, made with other or unknown settings."""
    path, wanted = folder / SETTINGS_FILE, _settings(variant, sampling)
    if not path.is_file() and (there := next((video.path for video in videos if video.path.exists()), None)):
        got = f"got no file that says how {there.name} was made"
        raise ValueError(f"{path}: {got}, expected it, to continue; choose another output folder")
    found = read_object(path) if path.is_file() else wanted
    if "newest" in (found.get("model_files") or "newest"):  # of older versions, or before a download
        found = found | {"model_files": wanted["model_files"]}
    for key in wanted:
        if found.get(key) != wanted[key]:
            raise ValueError(
                f"{path}: got videos made with {key}={found.get(key)!r}, expected {wanted[key]!r} to "
                "continue; choose another output folder, or set it back"
            )


def write_settings(folder: Path, variant: Variant, sampling: SamplingDefaults) -> None:
    """Write generate.json: the settings that the videos of a folder are made with."""
    write_json(folder / SETTINGS_FILE, _settings(variant, sampling))


def _settings(variant: Variant, sampling: SamplingDefaults) -> dict:
    """Return the content of generate.json: the variant's identity and the sampling settings."""
    return variant.identity() | asdict(sampling)
