"""The package as it is installed, not linked: built as a wheel, started from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")
ROOT = Path(__file__).parents[2]
SOURCES = ("rlhf", "rewards", "configs", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
SMALL = {"max_steps": 1, "warmup_steps": 0, "per_device_train_batch_size": 1, "num_eval_prompts": 2}
SMALL |= {"num_diversity_prompts": 0, "num_sample_prompts": 2, "cpu_threads": 1}


def run(*command, **changes) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **changes)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, since a build leaves files behind."""
    tmp = tmp_path_factory.mktemp("wheel")
    (tmp / "sources").mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            leave = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tmp / "sources" / name, symlinks=True, ignore=leave)
        else:
            shutil.copy(ROOT / name, tmp / "sources")
    offline = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *offline, "-w", tmp, tmp / "sources")
    (built,) = tmp.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel):
    target = wheel.parent / "installed"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def test_the_wheel_has_every_module_and_data_file(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    kept = {p.relative_to(ROOT).as_posix() for room in ("rlhf", "rewards") for p in (ROOT / room).rglob("*.py")}
    recipes = (p for p in (ROOT / "configs").rglob("*") if p.is_file())
    kept |= {f"rlhf/config/recipes/{p.relative_to(ROOT / 'configs').as_posix()}" for p in recipes}
    data = (p for p in (ROOT / "rlhf").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc"))
    kept |= {p.relative_to(ROOT).as_posix() for p in data}
    assert kept - packed == set()
    assert not [name for name in packed if name.startswith(("tests", "bench", "configs", "build"))]


@pytest.mark.slow
def test_the_installed_command_runs_the_main_job_from_an_empty_folder(installed, tmp_path):
    alone = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    where = run(sys.executable, "-c", "import rlhf; print(rlhf.__file__)", cwd=tmp_path, env=alone)
    assert where.startswith(str(installed))
    here = {"cwd": tmp_path, "env": alone}
    flags = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    run(sys.executable, installed / "bin" / "contentv-rlhf", *flags, **here)
    summary = json.loads((tmp_path / "runs" / "nano" / "summary.json").read_text())
    assert summary["steps"] == 1
    for name in ("report.html", "adapter", "metrics.jsonl"):
        assert (tmp_path / "runs" / "nano" / name).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    told = run(
        sys.executable, "-m", "rlhf.train", "--config", "contentv_8b_24gib", "--dry_run", cwd=tmp_path, env=alone
    )
    assert "8,056,627,520 parameters" in told
    out = run(sys.executable, "-m", "rlhf.export", "runs/nano", "--adapter", "adapter", **here)
    assert (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").is_file(), out
