"""The host: random generators, the memory of this process and the way it is freed."""

import ctypes
import hashlib
import resource
import sys

import torch


def generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by the key, such as (seed, step, rank).

    Its draws are the same on every device and after a resume.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def process_peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> None:
    """Have this process reuse the memory that it frees instead of returning it to the system.

    Otherwise every large CPU tensor is made of untouched pages. Their page faults took two fifths
    of a training step of nano (bench/cpu_step.py). The process stays as large as its peak. Only
    glibc has this setting; elsewhere nothing happens.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # the parameters' numbers in malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    mallopt(top_pad, 256 * 2**20)
