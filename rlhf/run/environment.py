"""A run's hardware, versions and cost: environment.jsonl, one object for each start."""

import json
import os
import platform
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rlhf.device import describe, energy_joules, peak_memory, pick_device
from rlhf.distributed.accelerator import available_cores
from rlhf.io import read_log, write_rows

ENVIRONMENT = "environment.jsonl"
PACKAGES = ("contentv-rlhf", "torch", "diffusers", "transformers", "peft", "accelerate")


def record_start(folder: Path, device: str | None) -> None:
    """Append a line for a start: machine, versions, world size. device: as in the settings."""
    found = pick_device(device)
    row = {
        "started": time.time(),
        "monotonic": time.monotonic(),  # which nobody sets, as the clock may be
        "device": describe(found),
        "device_type": found.type,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "cores": available_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "energy_counter_joules": energy_joules(found),
    }
    with (folder / ENVIRONMENT).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def record_end(folder: Path, ended_by: str | None = None) -> None:
    """Complete the last line with seconds, peak memory in bytes, and joules if counted.

    Energy is that of all devices visible to this machine's processes, idle power included. Peak
    memory is counted since the last optimizer step began; metrics.jsonl has earlier peaks.

    ended_by: the error of a run that failed.
    """
    rows = read_environment(folder)
    if not rows:
        return
    last = rows[-1]
    device = pick_device(last.get("device_type"))
    seconds = time.monotonic() - last["monotonic"] if "monotonic" in last else time.time() - last["started"]
    last |= {"seconds": seconds, "peak_memory_bytes": peak_memory(device)}
    before, after = last.get("energy_counter_joules"), energy_joules(device)
    last |= {"ended_by": ended_by} if ended_by else {}
    last["energy_joules"] = None if before is None or after is None else after - before
    write_rows(folder / ENVIRONMENT, rows)


def read_environment(folder: Path) -> list[dict]:
    """Return one object for each start of the run, [] if none was recorded; skip damaged ones."""
    whole = lambda row: isinstance(row.get("started"), float) and isinstance(row.get("packages"), dict)
    return [row for row in read_log(folder / ENVIRONMENT) if whole(row)]


@cache
def _version(package: str) -> str | None:
    """Return the version of an installed package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
