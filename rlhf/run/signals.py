"""Signals that stop a training after the current step, with a checkpoint."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TrainingInterrupted(KeyboardInterrupt):
    """A signal ended the training after a step; `checkpoint` holds the state."""

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        super().__init__(f"stopped by a signal; the state is in {checkpoint}")


class StopRequest:
    """A context in which SIGINT, SIGTERM and SIGUSR1 only set `requested`.

    A second SIGINT or SIGTERM acts as usual.
    """

    SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]

    def __init__(self):
        self.requested = False
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python handles signals nowhere else
            self._before = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number, _):
        self.requested = True
        for other in (signal.SIGINT, signal.SIGTERM):  # a batch system sends its warning, SIGUSR1, more than once
            signal.signal(other, self._before[other])


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Have SIGTERM and SIGUSR1 raise KeyboardInterrupt while inside, unless they have handlers."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        free = [number for number in StopRequest.SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
        before = {number: signal.signal(number, signal.default_int_handler) for number in free}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
