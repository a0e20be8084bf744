"""Where a measurement was made."""

import os
import platform

import diffusers
import torch


def environment(device: torch.device) -> dict:
    """Return what a benchmark's result says about the machine."""
    name = platform.processor() or platform.machine()
    if device.type != "cpu":
        name = torch.get_device_module(device).get_device_name()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
