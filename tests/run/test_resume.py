"""Runs that go on by themselves, and on another number of processes."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import many_runs
import pytest
import torch
from processes import FOLDER, free_port, together
from tiny import tiny_pipeline
from toy_rewards import PROMPTS, redness

from rlhf.checks import check_config
from rlhf.config import ConfigError
from rlhf.run import checkpoint
from rlhf.run.metrics import read_metrics
from rlhf.run.resume import RESTART_COUNT, resolve_resume
from rlhf.trainer import RewardGradientTrainer


def train(args) -> list[int]:
    """The steps that are in the folder afterwards."""
    RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS).train()
    return [row["step"] for row in read_metrics(Path(args.output_dir))]


def test_a_first_start_does_as_it_is_told(make_args):
    args = make_args()
    assert resolve_resume(args) is args
    assert train(args) == [1, 2, 3]
    with pytest.raises(ConfigError, match="holds a run already"):
        train(args)


def test_auto_starts_goes_on_and_starts_over_where_nothing_was_saved(make_args):
    args = make_args(resume_from_checkpoint="auto", max_steps=2)
    assert train(args) == [1, 2]
    more = dataclasses.replace(args, max_steps=3)
    assert resolve_resume(more).resume_from_checkpoint == "latest"
    before = (Path(args.output_dir) / "checkpoints" / "step-2" / "state.json").stat().st_mtime_ns
    assert train(more) == [1, 2, 3]
    assert (Path(args.output_dir) / "checkpoints" / "step-2" / "state.json").stat().st_mtime_ns == before
    for path in (Path(args.output_dir) / "checkpoints").glob("step-*/manifest.json"):
        path.unlink()
    assert resolve_resume(more).overwrite_output_dir
    assert train(dataclasses.replace(args, max_steps=1)) == [1]


def test_resolve_resume_says_where_from_and_what_is_no_longer_the_same(make_args, capsys):
    args = make_args(max_steps=1, learning_rate=0.5)
    train(args)
    again = dataclasses.replace(args, resume_from_checkpoint="latest")
    assert "Going on" not in capsys.readouterr().out
    train(again)
    told = capsys.readouterr().out
    assert "checkpoints/step-1, step 1 of 1; no step is left, max_steps says how many the whole run has." in told
    assert "Other settings" not in told
    train(dataclasses.replace(again, max_steps=2, learning_rate=0.25))
    told = capsys.readouterr().out
    assert "step 1 of 2. Other settings than before: learning_rate 0.5 -> 0.25, max_steps 1 -> 2." in told


def test_a_checkpoint_whose_blocks_were_trained_whole_is_refused(make_args):
    args = make_args(max_steps=1)
    train(args)
    path = Path(args.output_dir) / "checkpoints" / "step-1" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"settings": state["settings"] | {"train_blocks": ["transformer_blocks.0"]}}))
    (path.parent / "manifest.json").write_text('{"files": {}}')
    with pytest.raises(ConfigError, match=r"step-1: train_blocks: got \['transformer_blocks.0'\], which this version"):
        train(dataclasses.replace(args, max_steps=2, resume_from_checkpoint="latest"))


def test_a_process_hashes_the_checkpoint_that_it_resumes_from_once(make_args, monkeypatch):
    args = make_args(max_steps=1)
    train(args)
    hashed, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: hashed.append(file.name) or digest(file, kind))
    checkpoint._hash.cache_clear()  # as in a new process
    train(dataclasses.replace(args, resume_from_checkpoint="auto"))
    own = [name for name in hashed if "/step-1/" in name]
    assert len(own) == len(set(own)) == 3


@pytest.mark.parametrize("told", [{}, {"overwrite_output_dir": True}])
def test_a_restarted_process_goes_on_whatever_it_was_told(make_args, monkeypatch, told):
    args = make_args(max_steps=2, **told)
    train(args)
    monkeypatch.setenv(RESTART_COUNT, "1")
    again = check_config(dataclasses.replace(args, max_steps=3), tiny_pipeline(), [redness], PROMPTS)
    assert (again.resume_from_checkpoint, again.overwrite_output_dir) == ("latest", False)
    assert resolve_resume(again) == again, "looking twice changes nothing"


def test_a_restarted_process_keeps_a_checkpoint_of_another_folder(make_args, monkeypatch, tmp_path):
    first = make_args(max_steps=1)
    train(first)
    monkeypatch.setenv(RESTART_COUNT, "1")
    path = str(Path(first.output_dir) / "checkpoints" / "step-1")
    args = make_args(output_dir=str(tmp_path / "other"), resume_from_checkpoint=path)
    assert resolve_resume(args) is args


def test_samples_are_counted_on_when_a_step_has_more_of_them(make_args):
    """Each prompt of an epoch comes once, also where the batch is another after a resume."""
    args = make_args(max_steps=2, per_device_train_batch_size=1)
    train(args)
    more = dataclasses.replace(args, max_steps=3, per_device_train_batch_size=4, resume_from_checkpoint="latest")
    trainer = RewardGradientTrainer(tiny_pipeline(), redness, more, PROMPTS)
    trainer.train()
    prompts = [trainer.batches.prompts_at(i, 1)[0] for i in range(2)] + trainer.batches.batch(2, 0).prompts
    assert sorted(prompts) == sorted(PROMPTS)
    assert [row["samples"] for row in read_metrics(Path(args.output_dir))] == [1, 2, 6]


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """One process for two steps, two for two, one for the last: as one for all of them."""
    whole = many_runs.run(tmp_path / "whole", {"per_device_train_batch_size": 2})
    one, two = {"per_device_train_batch_size": 2}, {"per_device_train_batch_size": 1, "resume_from_checkpoint": "auto"}
    many_runs.run(tmp_path / "run", one | {"max_steps": 2})
    together(many_runs.runs, tmp_path, {"run": two | {"max_steps": 4}}, processes=2)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-4" / "state.json").read_text())
    assert (state["processes"], state["samples"]) == (2, 8)
    parts = many_runs.run(tmp_path / "run", one | {"resume_from_checkpoint": "latest"})
    torch.testing.assert_close(parts["weights"], whole["weights"], rtol=0, atol=1e-6)
    columns = [[row["reward"] for row in read_metrics(tmp_path / name)] for name in ("run", "whole")]
    assert columns[0] == pytest.approx(columns[1], rel=1e-5)


@pytest.mark.slow
def test_torchrun_starts_a_run_again_which_goes_on_by_itself(tmp_path):
    own = {"per_device_train_batch_size": 1, "save_steps": 1}
    flags = ["--nproc_per_node=2", "--max_restarts=1", f"--master_port={free_port()}"]
    arguments = [str(FOLDER / "restarted.py"), str(tmp_path), json.dumps(own | {"reward": "killing"})]
    environment = os.environ | {
        "PYTHONPATH": str(FOLDER.parents[1]),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", *flags, *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    whole = many_runs.run(tmp_path / "whole", own | {"per_device_train_batch_size": 2})
    found = torch.load(tmp_path / "run-0.pt", weights_only=False)
    assert len(found["gradients"]) == 3, "only the last three of five steps were taken by the second start"
    torch.testing.assert_close(found["weights"], whole["weights"], rtol=0, atol=1e-6)
