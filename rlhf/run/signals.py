"""Signals that stop a training with its last finished step saved."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlhf.distributed.launch import TORCHRUN_MARK, outlive_launcher

ECHO_SECONDS = 1.0  # torchrun passes on the Ctrl-C that its processes have received already
GRACE_SECONDS = 20.0  # torchrun kills 30 s after it was told to stop


class TrainingInterrupted(KeyboardInterrupt):
    """A signal ended the training after a step; `checkpoint` holds the state."""

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        super().__init__(f"stopped by a signal; the state is in {checkpoint}")


class StopRequest:
    """A context in which SIGINT, SIGTERM, SIGUSR1 and SIGHUP ask a training to stop.

    SIGHUP, of a terminal that is gone, stays ignored under nohup.

    The first signal sets `requested`, and a line says at once what follows. A second SIGINT or
    SIGTERM raises KeyboardInterrupt in the current block of `interruptible`, or in the next one.
    A third one acts as usual.

    Args:
        speaks: whether this process prints the lines.
    """

    SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]

    def __init__(self, speaks: bool = True):
        self.speaks, self.requested, self.doing = speaks, False, "the step"  # doing: what will be finished
        self._before, self._insisted, self._open, self._timer, self._first = {}, False, False, None, 0.0

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python handles signals nowhere else
            wanted = [n for n in self.SIGNALS if n == signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._on_signal) for number in wanted}
        return self

    def __exit__(self, *_):
        if self._timer:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a second signal raise KeyboardInterrupt in the block, whose work may be lost."""
        self._open = True
        try:
            if self._insisted:
                raise KeyboardInterrupt
            yield
        finally:
            self._open = False

    def _on_signal(self, number, _):
        """Request the stop at the first signal, and interrupt at the second."""
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
            outlive_launcher()  # it ends at Ctrl-C, too, and the step is to be finished
            self._say(f"{signal.Signals(number).name}: finishing {self.doing}, then saving; again to stop now")
            if TORCHRUN_MARK in os.environ and number != signal.SIGUSR1:  # which torchrun neither sends nor hears
                self._timer = threading.Timer(GRACE_SECONDS, os.kill, (os.getpid(), signal.SIGTERM))
                self._timer.daemon = True
                self._timer.start()
            return
        echo = TORCHRUN_MARK in os.environ and time.monotonic() - self._first < ECHO_SECONDS
        if echo or number not in (signal.SIGINT, signal.SIGTERM):  # a batch system sends SIGUSR1 more than once
            return
        self._insisted = True
        self._say("stopping now, with the last finished step saved")
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, self._before.get(other, signal.SIG_IGN))
        if self._open:
            raise KeyboardInterrupt

    def _say(self, text: str) -> None:
        """Write a line to stderr, safe in a signal handler, if this process speaks."""
        if self.speaks:
            with suppress(OSError):  # of a terminal that is gone
                os.write(2, f"\n{text}\n".encode())  # print() may be what the signal interrupts


@contextmanager
def notice_ctrl_c() -> Iterator[Callable[[], None]]:
    """Yield a function that raises KeyboardInterrupt if a Ctrl-C was swallowed in the block so far.

    Libraries do so that catch every exception while they are imported.
    """
    seen = []

    def note(number, frame):
        seen.append(number)
        signal.default_int_handler(number, frame)

    def insist() -> None:
        if seen:
            raise KeyboardInterrupt

    is_free = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_free and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, note)
    try:
        yield insist
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Have SIGTERM and SIGUSR1 raise KeyboardInterrupt while inside, unless they have handlers."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        free = [number for number in StopRequest.SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
        before = {number: signal.signal(number, signal.default_int_handler) for number in free}
    try:
        yield
    except KeyboardInterrupt:
        outlive_launcher()  # to write what is left to write
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
