"""Types of command-line flags, checked by argparse before any work starts."""

import argparse
import math
import os
from argparse import ArgumentTypeError
from pathlib import Path

import torch
import yaml

from rlhf.config.coerce import require_no_nan
from rlhf.device import pick_device


def mapping(text: str) -> dict:
    """Parse a mapping in YAML or JSON, without NaN."""
    expected = "expected a mapping such as '{frames: 8}'"
    try:
        kwargs = require_no_nan(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError) as error:
        raise ArgumentTypeError(f"got {text!r}; {expected} ({error})") from error
    if not isinstance(kwargs, dict):
        raise ArgumentTypeError(f"got {text!r}; {expected}")
    return kwargs


def frame_count(text: str) -> int:
    """Parse a number of frames, at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"got {text!r}; expected a number of frames, 1 or more")
    return int(text)


def number(text: str) -> float:
    """Parse a number of at least 0, or infinity."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise ArgumentTypeError(f"got {text!r}; expected a number of at least 0")
    return value


def device(text: str) -> torch.device:
    """Parse the name of a device of this machine."""
    try:
        return pick_device(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def file_to_write(text: str) -> Path:
    """Parse the path of a writable file in an existing folder."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        got = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise ArgumentTypeError(f"got {got}, expected a file in a folder that exists; correct it, or create the folder")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ArgumentTypeError(f"got no right to write {path}, expected one; choose another")
    return path


def frame_rate(text: str) -> float:
    """Parse a number of frames a second, above 0."""
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise ArgumentTypeError(f"got {text!r}; expected frames a second, above 0")
    return rate


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the commands that score files."""
    parser.add_argument("--max_frames", type=frame_count, help="leading frames to score; default: all")
    parser.add_argument("--fps", type=frame_rate, help="frame rate of folders of numbered pictures")
    parser.add_argument(
        "--allow_truncated", action="store_true", help="score what is there of a video that was cut short"
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at a file that can't be scored; default: score the others"
    )
