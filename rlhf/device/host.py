"""The host: random generators, the memory of this process and the way it is freed."""

import ctypes
import hashlib
import mmap
import os
import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch

MAPS, CGROUP_MEMORY = Path("/proc/self/maps"), Path("/sys/fs/cgroup/memory.max")  # of Linux


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


def host_memory() -> int:
    """Return the bytes that this machine has, or a container's limit."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP_MEMORY.read_text().strip() if CGROUP_MEMORY.is_file() else "max"
    return size if limit == "max" else min(size, int(limit))


def drop_file_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Take the pages of tensors that lie in mapped files out of this process; keep the others.

    The pages stay in the system's cache, and are mapped again when they are read. What was written
    to them is lost: only for tensors that nobody reads any more. Only Linux has this.
    """
    mappings = file_mappings()
    for tensor in tensors:
        start, page = tensor.data_ptr(), mmap.PAGESIZE
        if any(low <= start < high for low, high in mappings):
            first, end = -(-start // page) * page, (start + tensor.nbytes) // page * page  # no neighbour's page
            if first < end:
                ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)


def file_mappings() -> list[tuple[int, int]]:
    """Return the address ranges of this process at which files are mapped privately."""
    if not MAPS.is_file():
        return []
    rows = (line.split(maxsplit=5) for line in MAPS.read_text().splitlines())
    ranges = (row[0].split("-") for row in rows if row[1].endswith("p") and row[4] != "0")
    return [(int(low, 16), int(high, 16)) for low, high in ranges]


def return_freed_memory() -> None:
    """Return the memory that this process has freed to the system, after what moved to a device.

    Weights of some MiB each are freed one by one, and glibc keeps their place. Elsewhere nothing
    happens.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


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
