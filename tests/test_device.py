"""The device is the one asked for, else the one present; nothing of another vendor is imported."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf import device as module
from rlhf.device import generator, local_device, peak_memory, pick_device, reset_peak_memory, synchronize

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("USE_ASCEND_NPU", raising=False)


def test_the_name_wins(monkeypatch):
    monkeypatch.setenv("USE_ASCEND_NPU", "1")
    assert pick_device("cpu") == CPU


@pytest.mark.parametrize("present", [None, torch.device("cuda")])
def test_without_a_name_it_is_what_the_machine_has(monkeypatch, present):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: present)
    assert pick_device() == (present or CPU)


@pytest.mark.parametrize("value", ["", "0"])
def test_an_unset_npu_switch_is_no_wish(monkeypatch, value):
    monkeypatch.setenv("USE_ASCEND_NPU", value)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert pick_device() == CPU


def test_an_npu_that_does_not_import_is_explained(monkeypatch):
    monkeypatch.setenv("USE_ASCEND_NPU", "1")
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(ValueError, match=r"torch_npu does not import .*rlhf\[npu\].*set_env.sh.*unset USE_ASC"):
        pick_device()


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="device='gpu', expected one of cuda, npu, mps, cpu"):
        pick_device("gpu")


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    with pytest.raises(ValueError, match="device='cuda:0', but PyTorch finds none here; use cpu, or check the driver"):
        pick_device("cuda:0")


def test_a_device_that_is_there_is_given_with_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("cuda:1") == torch.device("cuda", 1)


def test_each_process_of_a_host_gets_its_own_device(monkeypatch):
    monkeypatch.setattr(module, "pick_device", torch.device)
    assert local_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device("cuda") == torch.device("cuda", 3)
    assert local_device("cpu") == torch.device("cpu")


def test_memory_of_the_process_is_counted_in_bytes():
    synchronize(CPU)
    reset_peak_memory(CPU)
    assert 2**26 < peak_memory(CPU) < 2**37


def test_generators_are_functions_of_their_key():
    def draws(*key):
        return torch.randn(8, generator=generator(*key))

    assert torch.equal(draws(0, 1, 2), draws(0, 1, 2))
    different = [draws(0), draws(1), draws(0, 1), draws(1, 0), draws(0, 1, 2), draws("noise", 0)]
    assert len({tuple(d.tolist()) for d in different}) == len(different)
    assert generator(0).device == CPU


def test_only_one_file_names_vendors():
    word = re.compile(r"""torch\.(cuda|npu)\b|torch_npu|["'](cuda|npu|mps|nccl|hccl)["':]""")
    files = [ROOT / "demo.py", ROOT / "train_rlhf.py", *ROOT.glob("rlhf/**/*.py"), *ROOT.glob("rewards/**/*.py")]
    naming = {str(f.relative_to(ROOT)) for f in files if f.exists() and word.search(f.read_text())}
    assert naming == {"rlhf/device.py"}


def test_importing_the_package_imports_no_vendor():
    code = "import sys, rlhf.device, rlhf.contentv.loading; assert 'torch_npu' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert module.KNOWN_DEVICES[-1] == "cpu"


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_freed_memory_is_used_again():
    code = """
import resource, torch
from rlhf.device import keep_freed_memory
keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    before = faults()
    torch.ones(64 * 2**20 // 4).sum()
    last = faults() - before
print(last)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) < 1000  # untouched pages would be 16,384
