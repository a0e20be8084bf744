"""What the launcher asked for, and that its processes end with it."""

import os
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch.distributed as dist

from rlhf.config import ConfigError
from rlhf.distributed import accelerator, launch

VARIABLES = (*launch.PLACE, *launch.WRAPPERS, *launch.UNUSED, "MASTER_ADDR", launch.TORCHRUN_MARK)
RANK_0 = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
PLAIN = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_FSDP": "false"}


@pytest.fixture
def environment(monkeypatch):
    """Set these variables, and no other that a launcher sets."""

    def set_to(variables: dict[str, str]) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, None),
        (PLAIN, None),
        (RANK_0 | PLAIN, None),
        ({"WORLD_SIZE": "1"}, None),  # as some images set it
        ({"WORLD_SIZE": "2"}, "got WORLD_SIZE=2 in the environment without RANK and LOCAL_RANK, expected all"),
        (
            {"RANK": "1"},
            "got RANK=1 in the environment without WORLD_SIZE and LOCAL_RANK, expected all",
        ),
        (RANK_0 | {"RANK": "2"}, "expected RANK and LOCAL_RANK from 0 and below WORLD_SIZE; unset WORLD_SIZE RANK"),
        (RANK_0 | {"WORLD_SIZE": "two"}, "got WORLD_SIZE=two, RANK=0, LOCAL_RANK=0 in the environment, expected RANK"),
        (
            {"ACCELERATE_USE_FSDP": "true"},
            "asks for FSDP, expected plain processes: shard_base divides the weights",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "True"}, "asks for DeepSpeed, expected plain processes"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "use a --config_file of configs/accelerate, or torchrun"),
    ],
)
def test_a_launch_that_cannot_work_is_refused(environment, variables, told):
    environment(variables)
    problems = list(launch.launch_problems())
    assert [told in problem for problem in problems] == ([True] if told else [])


@pytest.mark.parametrize(
    ("variables", "processes", "told"),
    [
        (PLAIN, 1, []),
        (RANK_0 | PLAIN | {"MASTER_ADDR": "here"}, 2, []),
        (PLAIN | {"MASTER_ADDR": "127.0.0.1"}, 1, ["asked for several processes and started one, as it does on a CPU"]),
        ({"MASTER_ADDR": "127.0.0.1"}, 1, []),  # of something else
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            1,
            ["--mixed_precision bf16 has no effect; the setting dtype", "--dynamo_backend inductor has no effect"],
        ),
    ],
)
def test_what_has_no_effect_is_said_in_a_line(environment, variables, processes, told):
    environment(variables)
    notes = launch.launch_notes(processes)
    assert len(notes) == len(told)
    assert all(part in note and "\n" not in note for part, note in zip(told, notes, strict=True))


def test_processes_that_do_not_come_are_told(make_args, environment, monkeypatch):
    environment(RANK_0)

    def wait(**_):
        raise dist.DistStoreError("Timed out after 2 seconds waiting for clients. 1/2 clients joined.")

    monkeypatch.setattr(accelerator, "Accelerator", wait)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2, RANK=0: got no connection .*1/2 clients joined.*unset W"):
        accelerator.make_accelerator(make_args(ddp_timeout=2))


# ------------------------------------------------------------------------------ the launcher's death

WORKER = """
    import time
    from rlhf.distributed import launch
    launch.WATCH_SECONDS = 0.05
    launch.end_with_launcher()
    print("ready", flush=True)
    time.sleep(60)
"""
LAUNCHER = f"""
    import os, subprocess, sys, threading, time
    def start():
        child = subprocess.Popen([sys.executable, "-c", {textwrap.dedent(WORKER)!r}], stdout=subprocess.PIPE)
        child.stdout.readline()
        print(child.pid, flush=True)
    start()
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    print("joined", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="processes are watched by Linux's handles of them")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_workers_end_with_their_launcher_and_not_with_a_thread_of_it(number):
    """One is started by the launcher's first thread, one by a thread that ends before."""
    environment = os.environ | {launch.LAUNCHER_MARK: "no", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", textwrap.dedent(LAUNCHER)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as launcher:
        workers = [os.pidfd_open(int(launcher.stdout.readline())) for _ in range(2)]
        assert launcher.stdout.readline() == "joined\n"
        assert not any(ended(worker, 0.1) for worker in workers)
        launcher.send_signal(number)
    assert all(ended(worker, 20) for worker in workers)


def ended(handle: int, seconds: float) -> bool:
    return bool(select.select([handle], [], [], seconds)[0])


def test_a_process_without_a_launcher_outlives_its_shell(environment, monkeypatch):
    environment({})
    monkeypatch.setattr(launch, "_set_death_signal", lambda _: pytest.fail("asked for"))
    launch.end_with_launcher()
    assert launch._ended.is_set()
