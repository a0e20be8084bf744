"""One run a folder: a lock file names the host and the process of the run that is going on."""

import dataclasses
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlhf.config import ConfigError
from rlhf.distributed.launch import RESTART_COUNT, TORCHRUN_MARK
from rlhf.io import DamagedFileError, read_object

LOCK = "run.lock"


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process. Its start tells it from a later process with its number."""

    host: str
    pid: int
    started: str | None
    boot: str = ""  # of the host's kernel
    space: str = ""  # of process numbers: each container has its own
    launch: str = "none"  # torchrun's name for it

    @classmethod
    def current(cls) -> "Holder":
        """Return this process."""
        boot = _read(Path("/proc/sys/kernel/random/boot_id"))
        space = os.readlink("/proc/self/ns/pid") if boot else ""
        launch = os.environ.get(TORCHRUN_MARK, "none")
        return cls(socket.gethostname(), os.getpid(), _start_of(os.getpid()), boot, space, launch)

    def is_gone(self) -> bool | None:
        """Return whether the process has ended; None if that cannot be seen from here."""
        here = Holder.current()
        if here.launch == self.launch != "none" and int(os.environ.get(RESTART_COUNT, 0)) > 0:
            return True  # torchrun ends all processes, also those of other hosts, before it starts new ones
        if self.host != here.host or (self.boot == here.boot and self.space != here.space):
            return None
        return self.boot != here.boot or _start_of(self.pid) != self.started


def lock_problem(folder: Path) -> str | None:
    """Return who trains in a folder, with the cure; None if nobody does, or does no longer."""
    path, expected = folder / LOCK, "expected one run a folder"
    if not path.exists():
        return None
    try:
        holder = Holder(**read_object(path))
        gone = holder.is_gone()
    except (DamagedFileError, TypeError):
        return f"output_dir={folder}: got {path}, which names no process, {expected}; remove it if no run goes on there"
    if gone:
        return None
    got = f"output_dir={folder}: got a folder in which process {holder.pid} on {holder.host} trains, {expected}"
    if gone is None:
        return f"{got}; choose another. From {socket.gethostname()} that process cannot be seen: if it ended, rm {path}"
    return f"{got}; wait for it, stop it, or choose another"


@contextmanager
def lock_folder(folder: Path, wanted: bool) -> Iterator[None]:
    """Hold the folder's lock in the block, if wanted; make the folder.

    A lock whose process has ended is taken over. Raises ConfigError if another run holds the lock,
    or the folder cannot be made.
    """
    if not wanted:
        yield
        return
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # which a check of permissions does not find
        got = f"got no folder there ({error.strerror}), expected one that can be made"
        raise ConfigError([f"output_dir={folder}: {got}; choose another"]) from error
    if problem := lock_problem(folder):
        raise ConfigError([problem])
    path.unlink(missing_ok=True)
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:  # another start was faster
        raise ConfigError([lock_problem(folder) or f"output_dir={folder}: got two starts at once; try again"]) from None
    try:
        with file:
            json.dump(dataclasses.asdict(Holder.current()), file)
        yield
    finally:
        with suppress(OSError):  # a lock that stays is seen to be of a process that ended
            path.unlink()


def _start_of(pid: int) -> str | None:
    """Return when a process of this host started, as the system writes it; None if it has ended."""
    if Path("/proc/self/stat").exists():
        fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
        return fields[19] if fields and fields[0] not in "ZX" else None  # Z, X: dead, and not yet removed
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
