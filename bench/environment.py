"""What all benchmarks share: flags, the machine, the rows of a result file."""

import argparse
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


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser whose help has the script's docstring as it is."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=formatter)


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


def show_row(row: dict) -> None:
    """Print a row without its single measurements and settings."""
    print({key: value for key, value in row.items() if key not in ("settings", "all")}, flush=True)


def scored_frames(scored: str, frames: int) -> int:
    """Return the number of frames that "first", "all" or a number means."""
    return {"first": 1, "all": frames}.get(scored) or int(scored)


def free_memory(device: torch.device) -> None:
    """Give back the memory of what was deleted."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
