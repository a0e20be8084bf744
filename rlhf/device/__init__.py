"""Devices: their choice, memory and timing. Only this package names vendors.

The device is the one the user names, an Ascend NPU if USE_ASCEND_NPU=1, or what the machine has.
No function of another library is replaced. Attention is `F.scaled_dot_product_attention`
everywhere, because each vendor's PyTorch has a fused kernel behind it. accelerate chooses the
distributed backend by the device. `python -m rlhf.device --check` tests a device.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from rlhf import plugins
from rlhf.device.host import drop_file_pages as drop_file_pages
from rlhf.device.host import generator as generator
from rlhf.device.host import host_memory as host_memory
from rlhf.device.host import keep_freed_memory as keep_freed_memory
from rlhf.device.host import process_peak_memory
from rlhf.device.host import return_freed_memory as return_freed_memory

KNOWN_DEVICES = ("cuda", "npu", "mps", "cpu")
RATED_KIND = "cuda"  # of the devices whose rates the planner knows
CPU_INFO = Path("/proc/cpuinfo")


def pick_device(name: str | None = None) -> torch.device:
    """Return the device called `name` and set it up.

    Args:
        name: a kind of `KNOWN_DEVICES`, with or without a number ("cuda:1"). None: an Ascend NPU if
            USE_ASCEND_NPU=1, else the accelerator of this machine, else the CPU.

    Raises:
        ValueError: the name is unknown, or PyTorch finds no such device here.
    """
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
    """Return `pick_device(name)` with the number in LOCAL_RANK, which launchers set."""
    device = pick_device(name)
    rank = os.environ.get("LOCAL_RANK")
    return device if device.type == "cpu" or rank is None else torch.device(device.type, int(rank))


def _accelerator(name: str) -> torch.device:
    """Return a device that is no CPU; raise ValueError if PyTorch finds none of its kind."""
    kind = name.split(":")[0]
    if kind == "npu":
        _import_npu()
    if not torch.get_device_module(kind).is_available():
        present = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        raise ValueError(f"device={name!r}, but PyTorch finds none here; use {present}, or check the driver")
    device, count = torch.device(name), torch.get_device_module(kind).device_count()
    if (device.index or 0) >= count:
        raise ValueError(f"device={name!r}, but PyTorch finds {count} here; use {kind}:0 to {kind}:{count - 1}")
    return device


def _import_npu() -> None:
    """Import torch_npu, which adds the device to PyTorch; raise ValueError if it cannot be."""
    try:
        import torch_npu  # noqa: F401
    except Exception as error:
        raise ValueError(
            f"an Ascend NPU was asked for, but {_npu_problem(plugins.ERRORS.get('torch_npu', error))}, "
            "or unset USE_ASCEND_NPU"
        ) from error


def _npu_problem(error: Exception) -> str:
    """Return why torch_npu does not import, and the cure."""
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
    """Return whether PyTorch has several attention kernels to choose from on the device."""
    return device.type == "cuda"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the device is an x86 CPU with instructions that multiply bfloat16.

    With them a convolution is twice as fast as in float32, without them far slower.
    """
    flags = CPU_INFO.read_text().split() if device.type == "cpu" and CPU_INFO.is_file() else []
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def is_plugin_device(device: torch.device) -> bool:
    """Return whether a plug-in adds the device to PyTorch, with the plug-in's own kernels."""
    return device.type == "npu"


def describe(device: torch.device) -> str:
    """Return the product name, such as "NVIDIA H200"; its architecture where none is known."""
    if device.type in ("cuda", "npu"):
        return torch.get_device_module(device).get_device_name(device)
    lines = CPU_INFO.read_text().splitlines() if device.type == "cpu" and CPU_INFO.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Use deterministic kernels where they exist, and full float32 in products and convolutions.

    By default convolutions shorten float32 to 10 bits of mantissa (TF32 and HF32).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the device is first used
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.backends.cudnn.flags(allow_tf32=False, deterministic=True), _disable_hf32(device):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _disable_hf32(device: torch.device) -> Iterator[None]:
    """Disable HF32, the Ascend NPU's reduced-precision float32, while inside."""
    operators = [torch.npu.conv, torch.npu.matmul] if device.type == "npu" else []
    before = [operator.allow_hf32 for operator in operators]
    for operator in operators:
        operator.allow_hf32 = False
    try:
        yield
    finally:
        for operator, value in zip(operators, before, strict=True):
            operator.allow_hf32 = value


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queue."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_call(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def reset_peak_memory(device: torch.device) -> None:
    """Reset `peak_memory`. The peak of a process on the CPU cannot be reset."""
    if device.type in ("cuda", "npu"):
        torch.get_device_module(device).reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: PyTorch's on an accelerator, else that of this process."""
    if device.type in ("cuda", "npu"):
        return torch.get_device_module(device).max_memory_allocated(device)
    return process_peak_memory()


def total_memory(device: torch.device) -> int | None:
    """Return the device's memory in bytes; None for a device that uses the host's memory."""
    if device.type in ("cuda", "npu"):
        return torch.get_device_module(device).get_device_properties(device).total_memory
    return None


def non_pytorch_memory(device: torch.device) -> int:
    """Return the device's bytes in use outside of PyTorch's allocator.

    They are the context, loaded kernels and other processes; 0 if the device does not report it.
    """
    if device.type not in ("cuda", "npu"):
        return 0
    module = torch.get_device_module(device)
    free, total = module.mem_get_info(device)
    return total - free - module.memory_reserved(device)


def energy_joules(device: torch.device) -> float | None:
    """Return an energy counter in joules, summed over the devices of this host's processes.

    Only differences have a meaning. None if the device has no counter or nvidia-ml-py is missing.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        count = min(torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # one a process
        uuids = [torch.cuda.get_device_properties(i).uuid for i in range(count)]
        handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
        return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1000  # millijoules
    except ImportError:
        return None
    except pynvml.NVMLError:  # a device without the counter, a driver without the library
        return None
