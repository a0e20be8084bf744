"""The device is the one asked for, else the one present; nothing of another vendor is imported."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from rlhf import device as module
from rlhf import plugins
from rlhf.device import (
    describe,
    deterministic,
    generator,
    local_device,
    peak_memory,
    pick_device,
    reset_peak_memory,
    synchronize,
)

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("USE_ASCEND_NPU", raising=False)


def test_the_name_wins(monkeypatch):
    monkeypatch.setenv("USE_ASCEND_NPU", "1")
    assert pick_device("cpu") == CPU


@pytest.mark.parametrize("switch", [None, "", "0"])
@pytest.mark.parametrize("present", [None, torch.device("cuda")])
def test_without_a_name_it_is_what_the_machine_has(monkeypatch, present, switch):
    if switch is not None:
        monkeypatch.setenv("USE_ASCEND_NPU", switch)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: present)
    assert pick_device() == (present or CPU)


@pytest.mark.parametrize(
    ("installed", "told"),
    [
        (None, r"torch_npu is not installed; pip install 'contentv-rlhf\[npu\]' and source CANN's set_env.sh"),
        ("1.9.0.post2", r"torch_npu 1.9.0.post2 does not pair with torch .*, expected torch 1.9; .*'torch==1.9.\*'"),
        (
            torch.__version__,
            r"torch_npu .* does not load \(libhccl.so: no such file\); source CANN's set_env.sh in this shell",
        ),
    ],
)
def test_an_npu_that_cannot_be_had_is_explained(monkeypatch, installed, told):
    def version(name):
        assert name == "torch_npu"
        if installed is None:
            raise module.PackageNotFoundError(name)
        return installed

    monkeypatch.setenv("USE_ASCEND_NPU", "1")
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    monkeypatch.setitem(plugins.ERRORS, "torch_npu", ImportError("libhccl.so: no such file"))
    monkeypatch.setattr(module, "version", version)
    with pytest.raises(ValueError, match=f"an Ascend NPU was asked for, but {told}, or unset USE_ASCEND_NPU"):
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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="device='cuda:2', but PyTorch finds 2 here; use cuda:0 to cuda:1"):
        pick_device("cuda:2")


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


def test_reproducible_settings_are_put_back():
    before = torch.backends.cudnn.allow_tf32
    with deterministic(CPU):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.allow_tf32 == before
    assert len(describe(CPU)) > 2


def code_of(file: Path) -> str:
    """A program without its comments and docstrings."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return ast.unparse(tree)


def test_only_one_package_names_vendors():
    word = re.compile(r"\b(cuda|npu|torch_npu|nccl|hccl)\b|torch\.(backends\.)?mps")  # "mps" alone is a reward, too
    rooms = (ROOT / room for room in ("rlhf", "rewards", "eval", "bench"))
    files = [ROOT / "demo.py", ROOT / "train_rlhf.py", *(file for room in rooms for file in room.rglob("*.py"))]
    pretraining = ROOT / "bench" / "nano"  # whose step is captured as a graph
    assert {file.parent for file in files if word.search(code_of(file))} == {ROOT / "rlhf" / "device", pretraining}


class Plugin:
    """An entry point of the group torch.backends."""

    def __init__(self, module, error=None):
        self.module, self.error, self.loaded = module, error, 0

    def load(self):
        if self.error:
            raise self.error
        return self._autoload

    def _autoload(self):
        self.loaded += 1


def test_a_plug_in_that_cannot_load_counts_as_not_installed(monkeypatch):
    good, bad = Plugin("good_plugin"), Plugin("bad_plugin", OSError("libdriver.so: no such file"))
    monkeypatch.setattr(plugins, "entry_points", lambda group: [bad, good])
    monkeypatch.setattr(plugins, "ERRORS", {})
    monkeypatch.setitem(sys.modules, "bad_plugin", "half imported")
    plugins.load_plugins()
    assert good.loaded == 1
    assert {"bad_plugin": bad.error} == plugins.ERRORS
    assert sys.modules["bad_plugin"] is None
    assert importlib.util.find_spec("bad_plugin") is None
    assert "good_plugin" not in sys.modules


@pytest.mark.parametrize("entrance", ["rlhf", "rewards"])
def test_torch_itself_loads_no_plug_in(entrance):
    code = f"import {entrance}, os; print(os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'])"
    environment = {key: value for key, value in os.environ.items() if key != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr


@pytest.mark.parametrize("processes", [1, 8])
def test_the_launchers_files_for_npus_are_accelerates(processes):
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"npu_{processes}.yaml"))
    assert config.num_processes == processes
    assert config.distributed_type == ("MULTI_NPU" if processes > 1 else "NO")
    assert (config.mixed_precision, config.use_cpu) == ("no", False)


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


@pytest.mark.skipif(sys.platform != "linux", reason="the function is glibc's")
def test_freed_memory_is_returned():
    code = """
import resource, torch
from rlhf.device import return_freed_memory
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 2**20
torch.ones(16 * 2**20 // 4)  # freed: from here on smaller tensors come from the heap
tensors = [torch.ones(8 * 2**20 // 4) for _ in range(20)]
last = torch.ones(2**20 // 4)  # above them
tensors.clear()
kept = resident()
return_freed_memory()
print(kept - resident())
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) > 100  # of 160 MiB
