"""The launcher that started this process: what it asked for, and its death.

Imports no torch, so that its mistakes are told at once.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

LAUNCHER_MARK = "ACCELERATE_MIXED_PRECISION"  # set by `accelerate launch` for every process it starts
TORCHRUN_MARK = "TORCHELASTIC_RUN_ID"  # set by torchrun, and so by `accelerate launch` for several processes
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"  # the same
PLACE = ("WORLD_SIZE", "RANK", "LOCAL_RANK")  # of a process among others, by any launcher
WRAPPERS = {  # accelerate's ways to wrap a model, by variable
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
# Variables of `accelerate launch` that a run does not read: default, flag, what decides instead.
UNUSED = {
    LAUNCHER_MARK: ("no", "--mixed_precision", "the setting dtype"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "--dynamo_backend", "the setting compile_blocks"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "--gradient_accumulation_steps", "the setting of that name"),
}
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
WATCH_SECONDS = 1.0


def launcher_world_size() -> int:
    """Return the number of processes that the launcher started."""
    started = os.environ.get("WORLD_SIZE", "1")
    return int(started) if started.isdecimal() else 1  # `launch_problems` names anything else


def launch_problems() -> Iterator[str]:
    """Yield accelerate options that cannot work, and RANK variables that do not fit together."""
    for variable, name in WRAPPERS.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            yield (
                f"accelerate's configuration asks for {name}, expected plain processes: shard_base divides the weights "
                "and sequence_parallel the tokens; use a --config_file of configs/accelerate, or torchrun"
            )
    place = {name: os.environ[name] for name in PLACE if name in os.environ}
    if not place or place == {"WORLD_SIZE": "1"}:
        return
    numbers = [int(value) if value.isdecimal() else -1 for value in place.values()]
    got = f"got {', '.join(f'{name}={value}' for name, value in place.items())} in the environment"
    cure = f"unset {' '.join(place)}, or start with `accelerate launch` or torchrun"
    if len(place) < len(PLACE):
        missing = " and ".join(name for name in PLACE if name not in place)
        yield f"{got} without {missing}, expected all of them or none: they are of another launch; {cure}"
    elif not max(numbers[1:]) < numbers[0] or min(numbers) < 0:
        yield f"{got}, expected RANK and LOCAL_RANK from 0 and below WORLD_SIZE; {cure}"


def launch_notes(processes: int) -> list[str]:
    """Return a line for each thing that the launcher was asked for and that has no effect.

    processes: how many there are.
    """
    notes = [
        f"accelerate's {flag} {value.lower()} has no effect; {ours} decides"
        for variable, (usual, flag, ours) in UNUSED.items()
        if (value := os.environ.get(variable, usual)).lower() != usual
    ]
    if processes == 1 and LAUNCHER_MARK in os.environ and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        notes.append(
            "`accelerate launch` was asked for several processes and started one, as it does on a CPU; "
            "`torchrun --nproc_per_node N train_rlhf.py` starts N"
        )
    return notes


# ----------------------------------------------------------------------------- the launcher's death

_ended = threading.Event()  # set when the launcher's death is no longer to end this process
_ended.set()


def end_with_launcher() -> None:
    """Have this process get SIGTERM when the launcher that started it dies.

    Does nothing in a process that neither accelerate nor torchrun started, which may outlive its
    shell. Linux sends the signal when the parent *thread* ends, so it is asked only if that thread
    is the launcher's first. Else a thread of this process looks for its parent.
    """
    if not _ended.is_set() or not {LAUNCHER_MARK, TORCHRUN_MARK} & os.environ.keys():
        return
    _ended.clear()
    parent = os.getppid()
    if _is_child_of_main_thread(parent) and _set_death_signal(signal.SIGTERM) and os.getppid() == parent:
        return
    threading.Thread(target=_watch_parent, args=(parent,), daemon=True, name="launcher watch").start()


def outlive_launcher() -> None:
    """Undo `end_with_launcher`, in a process that is about to end by itself."""
    if not _ended.is_set():
        _ended.set()
        _set_death_signal(0)


def _is_child_of_main_thread(parent: int) -> bool:
    """Return whether the parent's first thread started this process; False if unknown."""
    try:
        return str(os.getpid()) in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:  # no Linux, or a kernel without this file
        return False


def _set_death_signal(number: int) -> bool:
    """Have Linux send this process a signal when its parent ends, 0 for none; return success."""
    return sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) == 0


def _watch_parent(parent: int) -> None:
    """Send SIGTERM to this process once it has another parent; runs in a thread."""
    while not _ended.wait(WATCH_SECONDS):
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
            return
