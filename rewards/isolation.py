"""Run the code of a reward so that it cannot change the process for a run, nor hang it."""

import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy
import torch

from rlhf.device.switches import RANDOM_STATE, SWITCHES


class TimeLimitError(BaseException):
    """The end of `time_limit`: no Exception, so that a loop of retries cannot catch it."""


# Each read and written, in this order.
_SWITCHES = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    (torch.get_num_threads, torch.set_num_threads),
    (lambda: _working_folder(), lambda folder: folder and os.chdir(folder)),
    *SWITCHES,
)
_RANDOM = (
    (random.getstate, random.setstate),
    (numpy.random.get_state, numpy.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
    RANDOM_STATE,
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
