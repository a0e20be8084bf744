"""One run a folder: its lock is held while it trains, and free when its process has ended."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from runs import At, train

from rlhf.config import ConfigError
from rlhf.distributed.launch import RESTART_COUNT, TORCHRUN_MARK
from rlhf.run import lock
from rlhf.run.lock import LOCK, lock_folder, lock_problem


def write(folder, **changes) -> None:
    """What a killed process leaves: its name in a file that is not locked."""
    (folder / LOCK).write_text(json.dumps(lock._this_process() | {"pid": 7} | changes))


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
    with pytest.raises(OSError, match="File too large"), file_limit(10), lock_folder(tmp_path, wanted=True):
        pytest.fail("held a lock that names nobody")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_place_of_the_lock_is_named_with_the_cure(tmp_path, make_args):
    (tmp_path / "run" / LOCK).mkdir(parents=True)
    cure = r"run\.lock, which cannot be opened as a file \(Is a directory\), expected .* move it away"
    assert re.search(cure, lock_problem(tmp_path / "run"))
    with pytest.raises(ConfigError, match=cure):
        train(make_args(max_steps=1))


def test_a_lock_that_may_only_be_read_is_named_with_the_cure(tmp_path, monkeypatch):
    """Of another user; the rights are pretended, for root may everything."""
    may, error = Path.open, PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r", **how: may(path, mode, **how) if mode == "r" else fail(error)
    )
    with (
        pytest.raises(ConfigError, match=r"run\.lock, which cannot be opened .*Permission denied"),
        lock_folder(tmp_path, True),
    ):
        pytest.fail("held a lock that cannot be written")


def fail(error: Exception):
    raise error


HOLDING = """
import sys, time
from pathlib import Path
from rlhf.run.lock import lock_folder
with lock_folder(Path(sys.argv[1]), wanted=True):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_holds_it_no_longer(tmp_path):
    """Not even as a zombie, which a worker that torchrun has killed is until it is waited for."""
    with subprocess.Popen([sys.executable, "-c", HOLDING, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert f"process {other.pid} on " in lock_problem(tmp_path)
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert (tmp_path / LOCK).exists()
        assert lock_problem(tmp_path) is None
        with lock_folder(tmp_path, wanted=True):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("launch", "restarts", "free"), [("a", 1, True), ("a", 0, False), ("b", 1, False), ("none", 1, False)]
)
def test_a_restart_by_torchrun_takes_over_from_another_host(tmp_path, monkeypatch, launch, restarts, free):
    monkeypatch.setenv(RESTART_COUNT, str(restarts))
    monkeypatch.setenv(TORCHRUN_MARK, "none" if launch == "none" else "a")
    write(tmp_path, host="node7", launch=launch)
    assert (lock_problem(tmp_path) is None) == free


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_process_that_cannot_be_seen_is_respected(tmp_path, monkeypatch, has_locks):
    """One of another host; or any, on a file system that cannot lock files."""
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "none here")))
        with lock_folder(tmp_path / "free", wanted=True):
            assert "cannot be seen" in lock_problem(tmp_path / "free")
    write(tmp_path, **{"host": "node7"} if has_locks else {})
    told = r"process 7 on .* trains, .*From .* that process cannot be seen: if it ended, rm .*run\.lock"
    with pytest.raises(ConfigError, match=told), lock_folder(tmp_path, wanted=True):
        pytest.fail("entered")
    assert (tmp_path / LOCK).exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_lock_that_a_kill_cut_short_is_free(tmp_path, text):
    (tmp_path / LOCK).write_text(text)
    assert lock_problem(tmp_path) is None


def test_of_two_starts_at_once_one_is_refused(tmp_path, monkeypatch):
    """The other one takes the lock after the look; or it ends, and removes the file that was opened."""
    refused = pytest.raises(ConfigError, match="got two starts at once")
    with (tmp_path / LOCK).open("w") as other, monkeypatch.context() as patch:
        patch.setattr(lock, "lock_problem", lambda folder: lock._try_lock(other) and None)
        with refused, lock_folder(tmp_path, wanted=True):
            pytest.fail("entered")
    monkeypatch.setattr(lock, "_try_lock", lambda file, **_: (tmp_path / LOCK).unlink(missing_ok=True) or True)
    with refused, lock_folder(tmp_path, wanted=True):
        pytest.fail("entered")
