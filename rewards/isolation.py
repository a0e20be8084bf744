"""Run the code of a reward so that it cannot change the process for a run, nor hang it."""

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from operator import attrgetter

import numpy
import torch
from torch.backends import cuda, cudnn, mkldnn


class TimeLimitError(BaseException):
    """The end of `time_limit`: no Exception, so that a loop of retries cannot catch it."""


def _attribute(owner, name: str) -> tuple[Callable, Callable]:
    return partial(attrgetter(name), owner), partial(setattr, owner, name)


# Each read and written, in this order: PyTorch's older switches of float32 change the newer ones.
_SWITCHES = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    (torch.get_num_threads, torch.set_num_threads),
    (lambda: _working_folder(), lambda folder: folder and os.chdir(folder)),
    (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda modes: torch.use_deterministic_algorithms(modes[0], warn_only=modes[1]),
    ),
    (lambda: _older_precision()[0], lambda value: value and torch.set_float32_matmul_precision(value)),
    (lambda: _older_precision()[1], lambda value: value is not None and setattr(cudnn, "allow_tf32", value)),
    *(_attribute(owner, "fp32_precision") for owner in (torch.backends, cudnn, mkldnn, cuda.matmul)),
    *(_attribute(owner, "fp32_precision") for owner in (cudnn.conv, cudnn.rnn)),
    *(_attribute(owner, "fp32_precision") for owner in (mkldnn.matmul, mkldnn.conv, mkldnn.rnn)),
    *(_attribute(cuda.matmul, f"allow_{dtype}_reduced_precision_reduction") for dtype in ("fp16", "bf16")),
    *(_attribute(cudnn, name) for name in ("enabled", "benchmark", "deterministic")),
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
)
_RANDOM = (
    (random.getstate, random.setstate),
    (numpy.random.get_state, numpy.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
    (lambda: _accelerator_state(), lambda state: state is not None and _accelerator().set_rng_state(state)),
)


@contextmanager
def keep_process_state() -> Iterator[None]:
    """Restore gradient mode, default dtype and device, threads, folder, sys.argv and random states.

    So are PyTorch's switches of float32 precision (TF32), cuDNN, attention kernels and determinism.
    Random states are those of random, NumPy, and torch on the CPU and the current accelerator. It
    takes less than a millisecond.
    """
    switches, states = ([read() for read, _ in pairs] for pairs in (_SWITCHES, _RANDOM))
    argv, arguments = sys.argv, sys.argv[:]
    try:
        yield
    finally:
        for (read, write), value in zip(_SWITCHES, switches, strict=True):
            if read() != value:
                write(value)
        for (_, write), state in zip(_RANDOM, states, strict=True):
            write(state)
        sys.argv, argv[:] = argv, arguments


def _working_folder() -> str | None:
    """Return the working folder, None if it was deleted."""
    with suppress(OSError):
        return os.getcwd()


def _older_precision() -> tuple[str | None, bool | None]:
    """Return the older switches of products and convolutions; None where only newer ones are used.

    PyTorch raises an error for an older switch that contradicts a newer one.
    """
    values: list = [None, None]
    for index, read in enumerate((torch.get_float32_matmul_precision, lambda: cudnn.allow_tf32)):
        with suppress(RuntimeError):
            values[index] = read()
    return tuple(values)


def _accelerator():
    """Return the module of this machine's accelerator, such as torch.cuda; None before its use."""
    device = torch.accelerator.current_accelerator()
    module = device and torch.get_device_module(device)
    return module if module and getattr(module, "is_initialized", module.is_available)() else None


def _accelerator_state() -> torch.Tensor | None:
    module = _accelerator()
    return module and module.get_rng_state()


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise TimeLimitError in what runs inside after so many seconds; None: never.

    Without effect outside of the main thread and on Windows, which lack the signal. Code in C that
    does not come back to Python is not stopped.
    """
    if seconds is None or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum, frame):
        raise TimeLimitError

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
