"""Where tensors live: the only file that names vendors.

A device is named by the user, by USE_ASCEND_NPU=1, or is what the machine has; no function of another library is
replaced. Attention is `F.scaled_dot_product_attention` everywhere: each vendor's PyTorch has a fused kernel behind it.
The distributed backend is accelerate's choice, by the device. `python -m rlhf.device --check` tries a device out.
"""

import ctypes
import hashlib
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch

from rlhf import plugins

KNOWN_DEVICES = ("cuda", "npu", "mps", "cpu")


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`; else an Ascend NPU if USE_ASCEND_NPU=1; else the accelerator present; else the CPU."""
    if name is None and os.environ.get("USE_ASCEND_NPU", "0") not in ("", "0"):
        name = "npu"
    if name is None:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    elif name.split(":")[0] not in KNOWN_DEVICES:
        raise ValueError(f"device={name!r}, expected one of {', '.join(KNOWN_DEVICES)}; correct the name")
    else:
        device = torch.device(name) if name == "cpu" else _accelerator(name)
    if device.type == "npu":
        torch.npu.config.allow_internal_format = False  # tensors keep the layout that they have elsewhere
        torch.backends.mha.set_fastpath_enabled(False)  # its fused operators have no kernel there
    return device


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
    except Exception as error:
        raise ValueError(
            f"an Ascend NPU was asked for, but {_why_no_npu(plugins.ERRORS.get('torch_npu', error))}, "
            "or unset USE_ASCEND_NPU"
        ) from error


def _why_no_npu(error: Exception) -> str:
    try:
        found = version("torch_npu")
    except PackageNotFoundError:
        return "torch_npu is not installed; pip install 'contentv-rlhf[npu]' and source CANN's set_env.sh"
    pair = ".".join(found.split(".")[:2])
    if not torch.__version__.startswith(f"{pair}."):
        return (
            f"torch_npu {found} does not pair with torch {torch.__version__}, expected torch {pair}; "
            f"pip install 'torch=={pair}.*'"
        )
    return f"torch_npu {found} does not load ({error}); source CANN's set_env.sh in this shell"


def has_attention_kernels(device: torch.device) -> bool:
    """Whether PyTorch lets one choose the kernel of attention there; elsewhere there is one, or the plug-in's own."""
    return device.type == "cuda"


def is_plugged_in(device: torch.device) -> bool:
    """Whether PyTorch knows the device by a plug-in, which brings kernels of its own."""
    return device.type == "npu"


def describe(device: torch.device) -> str:
    """The device's own name, such as "NVIDIA H200"; for a CPU, the processor's architecture and cores."""
    if device.type in ("cuda", "npu"):
        return torch.get_device_module(device).get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} cores"


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Inside, deterministic kernels where there are such, and float32 products and convolutions in full float32.

    The vendors' defaults shorten float32 to 10 bits of mantissa in convolutions (TF32 and HF32).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the device is first used
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.backends.cudnn.flags(allow_tf32=False, deterministic=True), _no_hf32(device):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _no_hf32(device: torch.device) -> Iterator[None]:
    places = [torch.npu.conv, torch.npu.matmul] if device.type == "npu" else []
    before = [place.allow_hf32 for place in places]
    for place in places:
        place.allow_hf32 = False
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_hf32 = value


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue, so that wall-clock times mean something."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, with all that the device does for it."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


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


def total_memory(device: torch.device) -> int | None:
    """Bytes that the device has; None where that is the machine's own memory."""
    if device.type in ("cuda", "npu"):
        return torch.get_device_module(device).get_device_properties(device).total_memory
    return None


def memory_beside(device: torch.device) -> int:
    """Bytes of the device in use besides what PyTorch has asked for: its context, kernels, and other processes."""
    if device.type not in ("cuda", "npu"):
        return 0
    module = torch.get_device_module(device)
    free, total = module.mem_get_info(device)
    return total - free - module.memory_reserved(device)


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

    On a CPU every large tensor otherwise comes as untouched pages, whose faults took two fifths of a training step of
    nano (bench/cpu_step.py). The process then stays as large as it was at its peak.
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


if __name__ == "__main__":
    from rlhf.device_check import main

    sys.exit(main(sys.argv[1:]))
