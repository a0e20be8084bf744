"""What a run ran on, and what it took."""

import sys
from types import SimpleNamespace

import pytest
import torch

from rlhf.device import energy_joules
from rlhf.run.environment import read_environment, record_end, record_start


def test_a_line_for_each_start_and_the_last_one_is_completed(tmp_path, monkeypatch):
    assert read_environment(tmp_path) == []
    record_end(tmp_path)  # of a run that recorded no start: nothing to complete
    record_start(tmp_path, "cpu")
    monkeypatch.setenv("WORLD_SIZE", "4")
    record_start(tmp_path, None if not torch.accelerator.is_available() else "cpu")
    monkeypatch.setattr("time.monotonic", lambda: read_environment(tmp_path)[-1]["monotonic"] + 9)
    monkeypatch.setattr("time.time", lambda: 0.0)  # the clock is set back
    record_end(tmp_path)
    first, second = read_environment(tmp_path)
    assert (first["processes"], second["processes"]) == (1, 4)
    assert first["device_type"] == "cpu"
    assert len(first["device"]) > 2
    assert first["packages"]["torch"]
    assert "seconds" not in first
    assert second["seconds"] == pytest.approx(9)
    assert 50e6 < second["peak_memory_bytes"] < 1e12
    assert second["energy_joules"] is None  # a CPU does not tell


class Counter:
    """nvidia-ml-py's functions, for devices that have drawn 1,000 and 2,000 millijoules."""

    NVMLError = RuntimeError

    def __init__(self, error=None):
        self.error = error

    def nvmlInit(self):
        if self.error:
            raise self.error

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return {"GPU-a": 1000, "GPU-b": 2000}[uuid]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return handle


@pytest.mark.parametrize(("processes", "joules"), [("1", 1.0), ("2", 3.0), ("8", 3.0)])
def test_energy_is_that_of_the_devices_in_use(monkeypatch, processes, joules):
    monkeypatch.setitem(sys.modules, "pynvml", Counter())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid="ab"[i]))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert energy_joules(torch.device("cuda")) == joules


def test_a_device_that_does_not_tell_has_no_energy(monkeypatch):
    assert energy_joules(torch.device("cpu")) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert energy_joules(torch.device("cuda")) is None
    monkeypatch.setitem(sys.modules, "pynvml", Counter(RuntimeError("no driver")))
    assert energy_joules(torch.device("cuda")) is None
