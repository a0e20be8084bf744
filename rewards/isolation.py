"""Run the code of a reward so that it cannot change the process for a run, nor hang it."""

import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch


class TimeLimitError(BaseException):
    """The end of `time_limit`: no Exception, so that a loop of retries cannot catch it."""


@contextmanager
def keep_process_state() -> Iterator[None]:
    """Restore gradient mode, default dtype and device, working folder, sys.argv and random states.

    Random states are those of random, NumPy and torch's CPU. An accelerator's is left alone: a run
    draws on the CPU. It takes about 0.1 ms.
    """
    gradient, dtype, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    folder, argv, arguments = _working_folder(), sys.argv, sys.argv[:]
    numpy = sys.modules.get("numpy")
    states = random.getstate(), torch.get_rng_state(), numpy and numpy.random.get_state()
    try:
        yield
    finally:
        torch.set_grad_enabled(gradient)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        if folder is not None and _working_folder() != folder:
            os.chdir(folder)
        sys.argv, argv[:] = argv, arguments
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        if numpy:
            numpy.random.set_state(states[2])


def _working_folder() -> str | None:
    """Return the working folder, None if it was deleted."""
    with suppress(OSError):
        return os.getcwd()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitError in what runs inside after so many seconds.

    Without effect outside of the main thread and on Windows, which lack the signal.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
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
