"""Trackers get the numbers of each step and the sample videos, in the form that each of them can
show.
"""

import io
import sys
import types
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_pipeline
from toy_rewards import PROMPTS, redness

from rlhf.run.trackers import Clip, run_trackers, show_samples
from rlhf.run.video import write_samples
from rlhf.trainer import RewardGradientTrainer


def video(fps=8, frames=5, height=32, width=48) -> Clip:
    pixels = torch.zeros(3, frames, height, width, dtype=torch.uint8)
    pixels[0] = torch.linspace(0, 250, frames).round()[:, None, None]  # ever redder
    return Clip(Path("00.mp4"), "it reddens", pixels, fps)


@pytest.mark.parametrize(
    ("settings", "size", "frames", "milliseconds"),
    [({}, (48, 32), 5, 120), ({"fps": 24, "frames": 9, "height": 480, "width": 832}, (320, 185), 5, 80)],
)
def test_a_gif_shows_the_video_smaller_and_slower_where_it_is_large(settings, size, frames, milliseconds):
    image = Image.open(io.BytesIO(video(**settings).gif()))
    assert (image.size, image.n_frames, image.info["duration"], image.info["loop"]) == (size, frames, milliseconds, 0)
    image.seek(frames - 1)
    assert abs(image.convert("RGB").getpixel((5, 5))[0] - 250) < 6


def events(folder) -> EventAccumulator:
    found = EventAccumulator(str(folder), {"images": 0, "tensors": 0, "scalars": 0})
    return found.Reload()


def test_tensorboard_gets_numbers_and_videos_of_a_whole_run(make_args, tmp_path):
    settings = {"max_steps": 2, "sample_steps": 1, "num_sample_prompts": 2, "num_diversity_prompts": 0}
    args = make_args(report_to=["tensorboard"], **settings)
    trainer = RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS, PROMPTS[:3])
    trainer.train()
    assert trainer.accelerator.trackers == [], "nothing is left for end_training to finish a second time"
    found = events(tmp_path / "run" / "trackers" / "contentv-rlhf")
    assert [event.step for event in found.Scalars("reward")] == [1, 2]
    for tag, prompt in zip(("samples/00", "samples/01"), PROMPTS, strict=False):
        images = found.Images(tag)
        assert [event.step for event in images] == [0, 1, 2]
        assert Image.open(io.BytesIO(images[0].encoded_image_string)).n_frames == 5
        assert (images[0].width, images[0].height) == (32, 16)
        text = found.Tensors(f"{tag}/text_summary")
        assert text[0].tensor_proto.string_val == [prompt.encode()]
    assert "samples/02" not in found.Tags()["images"]


class Run:
    """What wandb, trackio and swanlab have in common: a run that logs and finishes."""

    def __init__(self):
        self.logged, self.finished = [], 0

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


class Video:
    def __init__(self, data, caption):
        self.data, self.caption = data, caption


@pytest.fixture(params=["wandb", "trackio", "swanlab"])
def library(request, monkeypatch):
    """A stand-in for the library of this name, which need not be installed; accelerate's tracker of
    it is real.
    """
    run, module = Run(), types.ModuleType(request.param)
    module.init, module.Video, module.run, module.config = lambda project: run, Video, run, Settings()
    monkeypatch.setitem(sys.modules, request.param, module)
    monkeypatch.setattr(f"accelerate.tracking.is_{request.param}_available", lambda: True)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType(request.param)])
    return module


class Settings(dict):
    def update(self, values, allow_val_change):
        super().update(values)


def test_videos_reach_libraries_that_run_on_a_server(library, make_args, tmp_path):
    name = library.__name__
    accelerator = Accelerator(cpu=True, log_with=name)
    clips = write_samples(tmp_path, 7, ["a", "b"], torch.zeros(2, 3, 5, 32, 32, dtype=torch.uint8), fps=8)
    with run_trackers(accelerator, make_args(report_to=[name])):
        show_samples(accelerator, 7, clips)
    ((step, values),) = library.run.logged
    assert (step, list(values)) == (7, ["samples/00", "samples/01"])
    assert [shown.caption for shown in values.values()] == ["a", "b"]
    data = values["samples/01"].data
    if name == "swanlab":
        assert data.getvalue()[:6] == b"GIF89a"
    else:
        assert data == str(tmp_path / "step-000007" / "01.mp4")
    assert library.config["learning_rate"] == 1e-2
    assert library.run.finished == 1


def test_a_tracker_that_shows_no_videos_is_left_alone(library):
    """One that can is shown them after it."""
    logged = []
    trackers = [types.SimpleNamespace(name="mlflow", log=pytest.fail)]
    trackers += [types.SimpleNamespace(name=library.__name__, log=lambda *_, **__: logged.append(1))]
    show_samples(types.SimpleNamespace(trackers=trackers), 1, [video()])
    assert logged == [1]
