"""Where a measurement was made, and the rows of its result file."""

import gc
import json
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

import diffusers
import torch

from rlhf.device import describe
from rlhf.io import write_json


def environment(device: torch.device) -> dict:
    """Return what a benchmark's result says about the machine."""
    return {
        "device": describe(device),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }


def read_rows(path: Path, about: dict, key: Callable[[dict], object]) -> dict:
    """Return the rows of a result file by their key; {} if they are of another environment."""
    old = json.loads(path.read_text()) if path.exists() else {}
    return {key(row): row for row in old["rows"]} if old.get("environment") == about else {}


def write_rows(path: Path, about: dict, rows: Iterable[dict]) -> None:
    """Write a result file, whole or not at all: a run that is killed leaves the rows of before."""
    write_json(path, {"environment": about, "rows": list(rows)})


def free_memory(device: torch.device) -> None:
    """Give back the memory of what was deleted."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
