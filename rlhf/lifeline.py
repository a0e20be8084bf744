"""Which process of a run is lost, if one is: gone, or stuck while the others wait for it.

Every process tells of itself in the store of the process group, from a thread of its own, so that a process that is
stuck still beats while one that is gone does not. Where nothing has gone on for too long, or a collective broke, the
others' last words tell whose fault it is.
"""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

EXIT_LOST = 1
SLOWEST_BEAT = 5.0  # seconds


class Lifeline:
    """Of one process; `tick()` says that it goes on, `waiting()` surrounds what depends on the others.

    Args:
        patience: within `watched()`, seconds without a tick after which the others are looked at; then, if one of them
            is lost or this process is stuck itself, it ends with status 1 and a message. While all others go on, it
            waits.
        store: None for a process without others, for which nothing is done.
    """

    def __init__(self, rank: int, processes: int, patience: float, store: dist.Store | None = None):
        self.rank, self.processes, self.patience = rank, processes, patience
        self.interval = min(SLOWEST_BEAT, patience / 4)
        self.ticks, self.ticked, self.waits, self.beats = 0, time.monotonic(), 0, 0
        self.store, self.ended, self.is_watched = store, threading.Event(), False
        if store is not None:
            self._beat()
            threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def tick(self) -> None:
        """This process goes on."""
        self.ticks, self.ticked = self.ticks + 1, time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, it is up to the others that this process goes on."""
        self.tick()
        self.waits += 1
        try:
            yield
        finally:
            self.waits -= 1
            self.tick()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, this process ticks as long as it goes on; what it does elsewhere may take any time."""
        self.tick()
        self.is_watched = True
        try:
            yield
        finally:
            self.is_watched = False

    def end(self) -> None:
        """Give no more signs of life: the run is over."""
        self.ended.set()

    def lost(self) -> str | None:
        """Which processes are lost, in a sentence; None if all of them go on. Takes three beats."""
        if self.store is None:
            return None
        try:
            before = self._words()
            for _ in range(3):  # the others may be looking for lost ones just now, too
                time.sleep(self.interval)
                self._beat()
            now = self._words()
        except RuntimeError:  # the store's own process, the first one where no launcher keeps it
            stuck = f"Nothing has gone on in process {self.rank}, and the" if self._is_stuck() else "The"
            return f"{stuck} process that keeps the list of all, 0 unless a launcher does, is gone."
        gone = [rank for rank in now if rank != self.rank and now[rank] == before.get(rank)]
        if gone:
            return f"No sign of life from {self._named(gone, now)}: killed, stopped, or cut off."
        stuck = [word for word in now.values() if word["idle"] >= self.patience and not word["waits"]]
        first = min((word["ticks"] for word in stuck), default=0)  # others may be behind it in the same exchange
        behind = [rank for rank, word in now.items() if word in stuck and word["ticks"] == first]
        return f"Nothing has gone on in {self._named(behind, now)}." if behind else None

    def _watch(self) -> None:
        while not self.ended.wait(self.interval):
            self._beat()
            if not self._is_late():
                continue
            lost = self.lost()
            if lost and self._is_late():
                end_with(f"Process {self.rank} ends after {self._idle():.0f} s without progress. {lost}")

    def _is_late(self) -> bool:
        return self.is_watched and self._idle() >= self.patience

    def _is_stuck(self) -> bool:
        return self._is_late() and not self.waits

    def _idle(self) -> float:
        return time.monotonic() - self.ticked

    def _beat(self) -> None:
        self.beats += 1
        word = {"beat": self.beats, "ticks": self.ticks, "waits": self.waits, "idle": self._idle()}
        word |= {"pid": os.getpid(), "host": platform.node()}
        with suppress(RuntimeError):  # `lost` tells, if it comes to that
            self.store.set(f"lifeline/{self.rank}", json.dumps(word))

    def _words(self) -> dict[int, dict]:
        """What each process said last; one that has said nothing yet has only just begun."""
        self._beat()
        keys = {rank: f"lifeline/{rank}" for rank in range(self.processes)}
        return {rank: json.loads(self.store.get(key)) for rank, key in keys.items() if self.store.check([key])}

    def _named(self, ranks: list[int], words: dict[int, dict]) -> str:
        each = (f"process {r} (pid {words[r]['pid']} on {words[r]['host']}, {words[r]['idle']:.0f} s)" for r in ranks)
        return ", ".join(each)


def end_with(message: str) -> None:
    """End this process from any of its threads: the main one may be in a call that never returns."""
    print(message, file=sys.stderr, flush=True)
    os._exit(EXIT_LOST)
