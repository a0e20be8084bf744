"""Where tensors live: the only file that names vendors.

A device is named by the user, by USE_ASCEND_NPU=1, or is what the machine has. Nothing is imported for a device that
was not asked for, and nothing global is patched.
"""

import ctypes
import hashlib
import os
import resource
import sys
from collections.abc import Callable

import torch

KNOWN_DEVICES = ("cuda", "npu", "mps", "cpu")


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`; else an Ascend NPU if USE_ASCEND_NPU=1; else the accelerator present; else the CPU."""
    if name is None and os.environ.get("USE_ASCEND_NPU", "0") not in ("", "0"):
        name = "npu"
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if name.split(":")[0] not in KNOWN_DEVICES:
        raise ValueError(f"device={name!r}, expected one of {', '.join(KNOWN_DEVICES)}; correct the name")
    return torch.device(name) if name == "cpu" else _accelerator(name)


def local_device(name: str | None = None) -> torch.device:
    """`pick_device`, and of several devices the one of this process, by the LOCAL_RANK that launchers set."""
    device = pick_device(name)
    rank = os.environ.get("LOCAL_RANK")
    return device if device.type == "cpu" or rank is None else torch.device(device.type, int(rank))


def _accelerator(name: str) -> torch.device:
    kind = name.split(":")[0]
    if kind == "npu":
        _import_npu()
    if not torch.get_device_module(kind).is_available():
        present = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        raise ValueError(f"device={name!r}, but PyTorch finds none here; use {present}, or check the driver")
    return torch.device(name)


def _import_npu() -> None:
    try:
        import torch_npu  # noqa: F401
    except Exception as error:  # a half-installed CANN raises anything from ImportError to OSError
        raise ValueError(
            f"an Ascend NPU was asked for, but torch_npu does not import ({error}); pip install 'contentv-rlhf[npu]' "
            "and source CANN's set_env.sh, or unset USE_ASCEND_NPU"
        ) from error


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue, so that wall-clock times mean something."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of `peak_memory`; the CPU's own peak cannot be reset."""
    if device.type in ("cuda", "npu"):
        torch.get_device_module(device).reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes held at once: on the device by PyTorch, or by this process where there is no such count."""
    if device.type in ("cuda", "npu"):
        return torch.get_device_module(device).max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def energy_joules(device: torch.device) -> float | None:
    """A counter of the energy drawn by the devices of this machine's processes; only differences mean something.

    None where the device does not tell, or nvidia-ml-py, which asks it, is not installed.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        own = range(min(torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))))  # one a process
        uuids = [torch.cuda.get_device_properties(i).uuid for i in own]
        handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
        return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1000  # millijoules
    except ImportError:
        return None
    except pynvml.NVMLError:  # a device without the counter, a driver without the library
        return None


def has_graphs(device: torch.device) -> bool:
    """Whether `capture` works there."""
    return device.type == "cuda"


def capture(step: Callable[[], torch.Tensor], reset: Callable[[], None]) -> Callable[[], torch.Tensor]:
    """A whole training step as one graph: warm-up on a side stream, then capture. Returns () -> the step's result.

    step must work on fixed tensors and read nothing back to the host; reset drops its gradients.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            reset()
            step()
    torch.cuda.current_stream().wait_stream(side)
    reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay():
        graph.replay()
        return result

    return replay


def keep_freed_memory() -> None:
    """Let this process reuse the memory that it frees instead of handing it back to the system (glibc only).

    On a CPU every large tensor otherwise comes as untouched pages, whose faults took two fifths of a training step.
    The process then stays as large as it was at its peak.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # the parameters' numbers in malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    mallopt(top_pad, 256 * 2**20)


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for the key, such as (seed, step, rank): the same draws on every device and after a resume."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
