"""The real torch_npu package without an NPU: without CANN, and on an emulated device.

docs/npu.md says what this proves and what it does not.
"""

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

try:
    version("torch_npu")
except PackageNotFoundError:
    pytest.skip("torch_npu is not installed; .ci/run does it in an environment of its own", allow_module_level=True)
if not (shutil.which("cc") and shutil.which("nm")):
    pytest.skip("cc and nm, which make the stand-in for CANN, are not installed", allow_module_level=True)


def run(*command: str, ok: bool = True, **environment: str) -> str:
    """Run a program from the repository with one thread; return the output of both streams."""
    kept = {key: value for key, value in os.environ.items() if key != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode == 0) == ok, done.stdout[-8000:]
    return done.stdout


@pytest.fixture(scope="module")
def standin(tmp_path_factory) -> dict[str, str]:
    """Return the environment variables of CANN's set_env.sh, with the stand-in's libraries."""
    sys.path.insert(0, str(HERE))
    from standin import build

    return {"LD_LIBRARY_PATH": str(build(tmp_path_factory.mktemp("cann"))), "STANDIN_NPU_COUNT": "1"}


# ---------------------------------------- without CANN


@pytest.mark.skipif("LD_LIBRARY_PATH" in os.environ, reason="CANN may be there")
def test_without_cann_all_else_works(tmp_path):
    assert "RuntimeError" in run("-c", "import torch", ok=False), "PyTorch by itself does not start"
    output = str(tmp_path / "video.mp4")
    assert f"wrote {output}" in run("demo.py", "--output", output, "--num_inference_steps", "1")
    run("-c", "import rewards, torch, diffusers")


@pytest.mark.skipif("LD_LIBRARY_PATH" in os.environ, reason="CANN may be there")
@pytest.mark.parametrize("command", [["train_rlhf.py", "--output_dir", "absent"], ["-m", "rlhf.device"]])
def test_without_cann_an_npu_that_was_asked_for_is_an_error(command):
    told = run(*command, ok=False, USE_ASCEND_NPU="1")
    assert f"torch_npu {version('torch_npu')} does not load" in told
    assert "source CANN's set_env.sh in this shell, or unset USE_ASCEND_NPU" in told
    assert "Traceback" not in told


# ---------------------------------------- with a stand-in


def test_without_a_device_it_says_so(standin):
    told = run("demo.py", ok=False, USE_ASCEND_NPU="1", **standin | {"STANDIN_NPU_COUNT": "0"})
    assert "device='npu', but PyTorch finds none here" in told


def test_on_the_emulated_npu(standin):
    told = run("-m", "pytest", "-q", "--dist", "load", "-p", "no:cacheprovider", "tests/npu/emulated.py", **standin)
    print(told)
    assert " passed" in told
    assert "skipped" not in told


def test_accelerate_launches_on_the_emulated_npu(standin, tmp_path):
    launch = "-m accelerate.commands.launch --config_file configs/accelerate/npu_1.yaml tests/npu/emulate.py"
    small = "--max_steps 1 --eval_prompts none --eval_reward_funcs nano_verifier --report_to none"
    small += " --per_device_train_batch_size 1"
    run(*launch.split(), "train_rlhf.py", *small.split(), "--output_dir", str(tmp_path / "run"), **standin)
    assert (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").exists()
