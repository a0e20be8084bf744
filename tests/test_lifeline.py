"""A lost process is noticed, named, and ends the others."""

import time
from pathlib import Path

import many_runs
import pytest
import torch.distributed as dist
from conftest import PROMPTS
from processes import start

from rlhf import lifeline
from rlhf.lifeline import Lifeline

PATIENCE = 1.0  # seconds; a beat every quarter of one


@pytest.fixture
def pair(monkeypatch):
    """Two processes' lifelines, and what they said when they ended theirs."""
    told = []
    monkeypatch.setattr(lifeline, "end_with", told.append)
    store = dist.HashStore()
    both = [Lifeline(rank, 2, PATIENCE, store) for rank in (0, 1)]
    with both[0].watched(), both[1].watched():
        yield *both, told
    for one in both:
        one.end()


def busy(line: Lifeline, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        line.tick()
        time.sleep(0.02)


def wait_for_news(told: list[str], count: int = 1) -> None:
    """Until so many have spoken, or should have long ago."""
    until = time.monotonic() + PATIENCE + 5
    while len(told) < count and time.monotonic() < until:
        time.sleep(0.02)


def test_who_waits_for_a_busy_one_waits_on(pair):
    first, second, told = pair
    with first.waiting():
        busy(second, 2 * PATIENCE + 1)
    assert told == []


def test_one_that_is_gone_is_named(pair):
    first, second, told = pair
    second.end()  # its thread beats no more, as after a kill
    with first.waiting():
        wait_for_news(told)
    assert told
    assert "Process 0 ends after" in told[0]
    assert "No sign of life from process 1 (pid" in told[0]


def test_one_that_is_stuck_is_named_by_the_others_and_by_itself(pair):
    first, second, told = pair
    with first.waiting():
        wait_for_news(told, 2)
    starts = {text.split(" ends")[0] for text in told}
    assert starts == {"Process 0", "Process 1"}
    assert all("Nothing has gone on in process 1 (pid" in text for text in told)


def test_of_those_in_one_exchange_the_one_behind_is_named(pair):
    """Within the transformer nobody is known to wait; who has made fewer calls is to blame."""
    first, second, told = pair
    first.tick()
    wait_for_news(told)
    assert told
    assert all("Nothing has gone on in process 1 (pid" in text for text in told)


def test_one_that_begins_while_the_others_look_is_not_lost(monkeypatch):
    store = dist.HashStore()
    first = Lifeline(0, 2, PATIENCE, store)
    later = []
    monkeypatch.setattr(lifeline.time, "sleep", lambda _: later or later.append(Lifeline(1, 2, PATIENCE, store)))
    assert first.lost() is None
    assert later
    for one in (first, *later):
        one.end()


def test_outside_of_a_run_nothing_is_watched(monkeypatch):
    told, store = [], dist.HashStore()
    monkeypatch.setattr(lifeline, "end_with", told.append)
    first, second = (Lifeline(rank, 2, PATIENCE, store) for rank in (0, 1))
    with first.watched():
        pass
    second.end()
    time.sleep(PATIENCE + 1.5)
    assert told == []
    first.end()


def test_where_the_list_of_all_is_gone_the_stuck_one_still_says_so(monkeypatch):
    class Gone(dist.HashStore):
        def get(self, key):
            raise RuntimeError("connection reset")

    told = []
    monkeypatch.setattr(lifeline, "end_with", told.append)
    alone = Lifeline(1, 2, PATIENCE, Gone())
    with alone.waiting():
        assert alone.lost().startswith("The process that keeps the list of all")
    with alone.watched():
        time.sleep(PATIENCE + 0.2)
        assert alone.lost().startswith("Nothing has gone on in process 1, and the process that keeps the list")
    alone.end()


def test_one_process_has_no_one_to_lose():
    alone = Lifeline(0, 1, PATIENCE)
    with alone.waiting():
        assert alone.lost() is None


# ------------------------------------------------------------------------------------------- real processes


def test_a_killed_worker_ends_the_other_which_says_who(tmp_path):
    own = {"max_steps": 1000, "per_device_train_batch_size": 1, "ddp_timeout": 6, "save_steps": 1}
    first, second = start(many_runs.train, tmp_path / "run", own)
    wait_for(tmp_path / "run" / "checkpoints" / "step-1" / "manifest.json", first)
    second.process.kill()
    told = first.finish(codes=(1,), timeout=60)
    assert f"A process was lost. No sign of life from process 1 (pid {second.process.pid} on" in told
    assert list((tmp_path / "run" / "checkpoints").glob("step-*")), "the last good state is kept"


@pytest.mark.slow
def test_a_hung_worker_ends_all_which_say_who(tmp_path):
    own = {"reward": "stuck", "prompts": PROMPTS, "per_device_train_batch_size": 1, "ddp_timeout": 6}
    both = start(many_runs.train, tmp_path / "run", own)
    told = [one.finish(codes=(lifeline.EXIT_LOST,), timeout=90) for one in both]
    assert "without progress. Nothing has gone on in process 1" in told[1]
    who = f"process 1 (pid {both[1].process.pid} on"  # by then it may be gone, by its own doing
    assert f"Nothing has gone on in {who}" in told[0] or f"No sign of life from {who}" in told[0]


def wait_for(path: Path, running) -> None:
    while not path.exists() or not path.read_text():
        assert running.process.is_alive(), running.output.read_text()
        time.sleep(0.05)
