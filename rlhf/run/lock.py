"""One run a folder: the process that trains in it has a file locked, which names it."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rlhf.config import ConfigError
from rlhf.distributed.launch import RESTART_COUNT, TORCHRUN_MARK

LOCK = "run.lock"


def lock_problem(folder: Path) -> str | None:
    """Return who trains in a folder, with the cure; None if nobody does, or does no longer.

    The system unlocks the file of a process that ended. Of one on another host, or on a file system
    without locks, it may not know.
    """
    path, here = folder / LOCK, _this_process()
    try:
        with path.open(encoding="utf-8") as file:
            free, holder = _try_lock(file, shared=True), _read_holder(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # such as a folder of that name
        return _useless(path, error)
    got = f"output_dir={folder}: got a folder in which process {holder['pid']} on {holder['host']} trains"
    got += ", expected one run a folder"
    if free is False:
        return f"{got}; wait for it, stop it, or choose another"
    restarted = here["launch"] == holder["launch"] != "none" and int(os.environ.get(RESTART_COUNT, 0)) > 0
    if restarted or (free and holder["host"] in (here["host"], "?")):
        return None  # torchrun ends all processes, also those of other hosts, before it starts new ones
    return f"{got}; choose another. From {here['host']} that process cannot be seen: if it ended, rm {path}"


@contextmanager
def lock_folder(folder: Path, wanted: bool) -> Iterator[None]:
    """Hold the folder's lock in the block, if wanted; make the folder.

    Raises ConfigError if another run holds the lock, or the folder cannot be made.
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
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError([_useless(path, error)]) from error
    with file:
        if _try_lock(file) is False or not _is_at(path, file):  # another start was faster
            got = f"output_dir={folder}: got two starts at once, expected one run a folder; try again"
            raise ConfigError([lock_problem(folder) or got])
        try:
            file.truncate(0)
            json.dump(_this_process(), file)
            file.flush()
            yield
        finally:
            with suppress(OSError):  # a file that stays is not locked
                path.unlink()


def _useless(path: Path, error: OSError) -> str:
    """Return the problem of a lock that cannot be opened."""
    got = f"got {path}, which cannot be opened as a file ({error.strerror})"
    return f"output_dir={path.parent}: {got}, expected the lock of a run, or none; move it away, or choose another"


def _this_process() -> dict:
    """Return host, process id and torchrun's launch id of this process."""
    launch = os.environ.get(TORCHRUN_MARK, "none")  # torchrun's name for it
    return {"host": socket.gethostname(), "pid": os.getpid(), "launch": launch}


def _read_holder(file: TextIO) -> dict:
    """Return the process that a lock names, with "?" for what a kill cut short."""
    unknown = {"host": "?", "pid": "?", "launch": "none"}
    with suppress(ValueError, TypeError):
        return unknown | json.load(file)
    return unknown


def _try_lock(file: TextIO, shared: bool = False) -> bool | None:
    """Lock a file until it is closed; return whether that worked, None without locks of files.

    shared: others may lock it so, too, which only look whether it is free.
    """
    import fcntl  # not on every system

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(path: Path, file: TextIO) -> bool:
    """Return whether the open file is still the one at the path, which its holder removes."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
