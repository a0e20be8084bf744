"""Several processes on one machine, as a launcher starts them, for scripts of this folder."""

import os
import socket
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def start(script: str, *arguments: str, processes: int = 1, **environment: str) -> list[subprocess.Popen]:
    """The processes of a script, on the CPU, with a thread each; their errors can be read."""
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)} | environment
    if processes > 1:
        environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost"}
        environ |= {"MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
    return [
        subprocess.Popen(
            [sys.executable, str(FOLDER / script), *arguments],
            env=environ | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def finish(processes: list[subprocess.Popen], codes=(0,), timeout: float = 240) -> list[str]:
    """Wait for all of them to end with one of the codes; what each wrote to its standard error."""
    errors = [process.communicate(timeout=timeout)[1] for process in processes]
    for process, told in zip(processes, errors, strict=True):
        assert process.returncode in codes, told
    return errors


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
