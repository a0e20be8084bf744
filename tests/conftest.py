"""Shared fixtures: everything random is seeded, tiny and made in code."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower on more; processes that tests start, too

import rlhf  # noqa: F401, I001 - it has to come before torch, see rlhf.plugins

import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from chromium import browser  # noqa: F401 - a fixture
from problem import Problem, keep_float64
from report_runs import encoded, finished, started  # noqa: F401 - fixtures
from tiny import tiny_pipeline, tiny_transformer, tiny_vae
from tiny_wan import tiny_wan_pipeline

from rlhf.config import RewardGradientConfig
from rlhf.device import keep_freed_memory

for folder in ("bench", "bench/nano"):
    sys.path.append(str(Path(__file__).parents[1] / folder))  # whose files import each other
torch.set_num_threads(1)
keep_freed_memory()
gc.disable()  # while tests are imported


def pytest_collection_finish():
    """What is imported stays: looking through it again and again took a tenth of the time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _no_report(request, monkeypatch):
    """Runs that take a second leave no report, which takes as long; tests ask for it by `real_report`."""
    if "real_report" not in request.fixturenames:
        monkeypatch.setattr("rlhf.report.finish_report", lambda folder, ended_by=None: None)


@pytest.fixture(autouse=True)
def _any_device():
    """Accelerate keeps a process's first device; with a GPU there are two to choose from."""
    if torch.cuda.is_available():
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def real_report():
    """The trainer writes its report, as it does outside of tests."""


@pytest.fixture
def tiny_pipe():
    return tiny_pipeline()


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The folder of a tiny pipeline, for tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(name="tiny_transformer")
def _tiny_transformer():
    return tiny_transformer()


@pytest.fixture(name="tiny_vae")
def _tiny_vae():
    return tiny_vae()


@pytest.fixture(params=[False, True], ids=["contentv", "wan"])
def problem(request, monkeypatch):
    """The adapter's gradient of a tiny model of each generator, in float64 throughout."""
    keep_float64(monkeypatch)
    return Problem(wan=request.param)


@pytest.fixture(params=[tiny_pipeline, tiny_wan_pipeline], ids=["contentv", "wan"])
def make_pipe(request):
    """Makes the tiny pipeline of each generator."""
    return request.param


@pytest.fixture
def file_limit():
    """Makes a block in which no file can be longer, as on a full disk."""

    @contextmanager
    def limit(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def make_args(tmp_path):
    """Settings for a run of seconds with the tiny pipeline; keywords replace any of them."""

    def make(**changes) -> RewardGradientConfig:
        values = {
            "output_dir": str(tmp_path / "run"),
            "eval_prompts": "none",
            "per_device_train_batch_size": 2,
            "num_frames": 5,
            "height": 16,
            "width": 32,
            "num_inference_steps": 3,
            "max_steps": 3,
            "lora_rank": 4,
            "num_sample_prompts": 2,
            "learning_rate": 1e-2,
            "report_to": "none",
            "cpu_threads": 1,
        }
        return RewardGradientConfig(**values | changes)

    return make
