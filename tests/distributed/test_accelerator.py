"""Threads of a process, and the rendezvous."""

from datetime import timedelta

import pytest
import torch.distributed as dist

from rlhf.distributed import accelerator as parallel


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Eight cores and an empty environment."""
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", parallel.LAUNCHER_MARK):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(parallel, "CGROUP_LIMIT", tmp_path / "cpu.max")
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "requested", "threads"),
    [
        ({}, None, 8),
        ({"LOCAL_WORLD_SIZE": "4"}, None, 2),
        ({"OMP_NUM_THREADS": "3"}, None, None),  # PyTorch has obeyed it already
        ({"OMP_NUM_THREADS": "3"}, 5, 5),
        ({"OMP_NUM_THREADS": "1"}, None, None),
        ({"OMP_NUM_THREADS": "1", parallel.LAUNCHER_MARK: "no"}, None, 8),  # of `accelerate launch`
    ],
)
def test_threads_are_those_asked_for_or_a_share_of_the_cores(machine, environment, requested, threads):
    for name, value in environment.items():
        machine.setenv(name, value)
    assert parallel.cpu_threads(requested) == threads


@pytest.mark.parametrize(("quota", "cores"), [("200000 100000", 2), ("max 100000", 8), ("50000 100000", 1)])
def test_a_containers_quota_counts(machine, tmp_path, quota, cores):
    (tmp_path / "cpu.max").write_text(quota)
    assert parallel.available_cores() == cores


def test_a_start_has_its_own_keys_on_one_host(monkeypatch):
    """A store may outlive a restart; hosts that count restarts differently still have to meet."""

    def keys(restarts: int, local: int) -> list[str]:
        for name, value in {"LOCAL_WORLD_SIZE": local, "WORLD_SIZE": 2, parallel.RESTART_COUNT: restarts}.items():
            monkeypatch.setenv(name, str(value))
        store = dist.HashStore()
        monkeypatch.setattr(parallel, "rendezvous", lambda url, timeout: iter([(store, 1, 2)]))
        ((found, rank, processes),) = parallel._rendezvous("restart://", timedelta(seconds=1))
        assert (rank, processes) == (1, 2)
        found.set("address", "here")
        return store.list_keys()

    assert keys(0, 2) != keys(1, 2)
    assert keys(0, 1) == keys(1, 1)
