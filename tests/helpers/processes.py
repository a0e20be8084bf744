"""Several processes on one machine, as by a launcher: forks of a server with all imports."""

import multiprocessing
import os
import socket
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["many_runs"])
FOLDER = Path(__file__).parent


@dataclass
class Started:
    """A process and where its output goes."""

    process: multiprocessing.Process
    output: Path

    def finish(self, codes=(0,), timeout: float = 600) -> str:
        """What it said until it ended, with one of the exit codes."""
        self.process.join(timeout)
        told = self.output.read_text(errors="replace")
        assert self.process.exitcode in codes, told
        return told


def start(function, *arguments, processes: int = 2, **environment: str) -> list[Started]:
    """function(*arguments) in each of the processes, on the CPU, one thread each."""
    common = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1} | environment
    if processes > 1:
        common |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # where it finds what to load
        forkserver.ensure_running()
    started = []
    for rank in range(processes):
        with tempfile.NamedTemporaryFile(prefix=f"process-{rank}-", delete=False) as file:
            output = Path(file.name)
        place = {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        given = {name: str(value) for name, value in (common | place).items()}
        process = SERVER.Process(target=_run, args=(output, given, function, arguments))
        process.start()
        started.append(Started(process, output))
    return started


def together(function, *arguments, processes: int = 2, **environment: str) -> list[str]:
    """As `start`; what each said, once all have ended well."""
    return [one.finish() for one in start(function, *arguments, processes=processes, **environment)]


def _run(output: Path, environment: dict[str, str], function, arguments: tuple) -> None:
    os.environ |= environment
    with output.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    function(*arguments)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
