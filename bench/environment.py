"""Where a measurement was made."""

import os
import platform

import diffusers
import torch

from rlhf.device import describe


def environment(device: torch.device) -> dict:
    """Return what a benchmark's result says about the machine."""
    return {
        "device": describe(device),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
