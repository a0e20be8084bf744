"""The launch files of configs/accelerate say how they are used, and start the command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from processes import FOLDER, free_port

from rlhf.run.metrics import read_metrics

ROOT = Path(__file__).parents[2]
LAUNCH = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.stem)
def test_launch_files_are_understood_and_named_by_their_processes(path):
    config = load_config_from_file(str(path))
    number = re.search(r"_(\d+)", path.stem)
    assert config.num_processes == (int(number[1]) if number else 16)
    assert config.mixed_precision == "no"
    assert path.name in path.read_text().split("compute_environment")[0], "its head says how to use it"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["guidance_parallel", "sequence_parallel"])
def test_a_launch_file_starts_the_command_on_several_processes(tmp_path, layout):
    flags = f"--device cpu --{layout} 2 --max_steps 2 --per_device_train_batch_size 1 --report_to none --cpu_threads 1"
    flags += f" --eval_prompts none --output_dir {tmp_path / 'run'}"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    command += ["--config_file", str(ROOT / "configs" / "accelerate" / "cpu_2.yaml"), str(ROOT / "train_rlhf.py")]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[1])}
    ended = subprocess.run([*command, *flags.split()], env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert len(read_metrics(tmp_path / "run")) == 2
    state = (tmp_path / "run" / "checkpoints" / "step-2" / "state.json").read_text()
    assert '"processes": 2' in state
