"""One run a folder: its lock is held while it trains, and taken over from a process that ended."""

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
from runs import At, train

from rlhf.config import ConfigError
from rlhf.distributed.launch import RESTART_COUNT, TORCHRUN_MARK
from rlhf.run import lock
from rlhf.run.lock import LOCK, Holder, lock_folder, lock_problem


def write(folder, **changes) -> None:
    (folder / LOCK).write_text(json.dumps(dataclasses.asdict(Holder.current()) | changes))


def test_a_second_run_in_a_folder_is_refused_while_the_first_one_trains(make_args, tmp_path):
    args = make_args(max_steps=1)
    found = []

    def look(_):
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} on .* trains, expected one run a folder; wait"):
            train(dataclasses.replace(args, resume_from_checkpoint="auto"))
        found.append((tmp_path / "run" / LOCK).is_file())

    train(args, callbacks=[At(1, look)])
    assert found == [True]
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
def test_it_is_released_at_every_ending(tmp_path, error):
    with lock_folder(tmp_path / "new", wanted=False):
        assert not (tmp_path / "new").exists(), "other processes leave it to the first one"
    with nullcontext() if error is None else pytest.raises(error), lock_folder(tmp_path / "new", wanted=True):
        assert json.loads((tmp_path / "new" / LOCK).read_text())["pid"] == os.getpid()
        if error:
            raise error
    assert list((tmp_path / "new").iterdir()) == []


def test_a_lock_that_has_no_room_on_the_disk_is_not_left_behind(tmp_path, file_limit):
    with pytest.raises(OSError, match="File too large"), file_limit(50), lock_folder(tmp_path, wanted=True):
        pytest.fail("held a lock that names nobody")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def gone():
    """The number of a process that has ended."""
    return subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout


@pytest.mark.parametrize("changes", [{}, {"pid": os.getpid(), "started": "1"}, {"pid": 1, "boot": "another"}])
def test_a_lock_of_a_process_that_ended_is_taken_over(tmp_path, gone, changes):
    """Its number may be another process's by now, and its host may have been started again."""
    write(tmp_path, **{"pid": int(gone)} | changes)
    assert lock_problem(tmp_path) is None
    with lock_folder(tmp_path, wanted=True):
        assert json.loads((tmp_path / LOCK).read_text())["started"] == Holder.current().started


@pytest.mark.parametrize(
    ("launch", "restarts", "free"), [("a", 1, True), ("a", 0, False), ("b", 1, False), ("none", 1, False)]
)
def test_a_restart_by_torchrun_takes_over_from_another_host(tmp_path, monkeypatch, launch, restarts, free):
    monkeypatch.setenv(RESTART_COUNT, str(restarts))
    monkeypatch.setenv(TORCHRUN_MARK, "none" if launch == "none" else "a")
    write(tmp_path, host="node7", launch=launch)
    assert (lock_problem(tmp_path) is None) == free


def test_a_process_that_is_dead_and_not_yet_removed_has_ended(tmp_path):
    """As a worker that torchrun has killed: it is a zombie until it is waited for."""
    with subprocess.Popen([sys.executable, "-c", ""]) as zombie:
        started = lock._start_of(zombie.pid)
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        assert started
        assert lock._start_of(zombie.pid) is None
        write(tmp_path, pid=zombie.pid, started=started)
        assert lock_problem(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "wait for it, stop it, or choose another"),
        ({"host": "node7"}, r"on node7 trains, .*From .* that process cannot be seen: if it ended, rm .*run\.lock"),
        ({"space": "pid:[7]"}, "that process cannot be seen"),  # of another container
        ({"unknown": 1}, r"names no process, expected one run a folder; remove it if no run goes on there"),
    ],
)
def test_a_lock_that_may_be_held_is_respected(tmp_path, changes, told):
    write(tmp_path, **changes)
    with pytest.raises(ConfigError, match=told), lock_folder(tmp_path, wanted=True):
        pytest.fail("entered")
    assert (tmp_path / LOCK).exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_lock_that_a_kill_cut_short_is_told(tmp_path, text):
    (tmp_path / LOCK).write_text(text)
    assert "names no process" in lock_problem(tmp_path)


def test_of_two_starts_at_once_one_is_refused(tmp_path, monkeypatch):
    said = iter([None, "held"])
    monkeypatch.setattr(lock, "lock_problem", lambda folder: next(said))
    monkeypatch.setattr(type(tmp_path), "unlink", lambda path, missing_ok: write(tmp_path))  # the other is faster
    with pytest.raises(ConfigError, match="held"), lock_folder(tmp_path, wanted=True):
        pytest.fail("entered")


@pytest.mark.skipif(sys.platform != "linux", reason="both ways of asking are here")
def test_systems_without_proc_ask_ps(monkeypatch, gone):
    monkeypatch.setattr(lock, "Path", lambda _: type("Nowhere", (), {"exists": lambda self: False})())
    assert lock._start_of(os.getpid()) == lock._start_of(os.getpid()) != ""
    assert lock._start_of(int(gone)) is None
