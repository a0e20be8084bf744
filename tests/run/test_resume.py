"""Runs that go on by themselves, and on another number of processes."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import many_runs
import pytest
import torch
from checkpoints import write_manifest
from processes import FOLDER, free_port
from tiny import tiny_pipeline, tiny_transformer
from toy_rewards import PROMPTS, redness

from rlhf import io
from rlhf.checks import check_config
from rlhf.config import ConfigError
from rlhf.evaluation.held_out import HeldOut
from rlhf.run.metrics import read_metrics
from rlhf.run.resume import RESTART_COUNT, resolve_resume, resume_message
from rlhf.trainer import RewardGradientTrainer


def train(args) -> list[int]:
    """The steps that are in the folder afterwards."""
    RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS).train()
    return [row["step"] for row in read_metrics(Path(args.output_dir))]


def test_auto_starts_and_goes_on(make_args):
    args = make_args(resume_from_checkpoint="auto", max_steps=2)
    assert train(args) == [1, 2]
    more = dataclasses.replace(args, max_steps=3)
    assert resolve_resume(more).resume_from_checkpoint == "latest"
    before = (Path(args.output_dir) / "checkpoints" / "step-2" / "state.json").stat().st_mtime_ns
    assert train(more) == [1, 2, 3]
    assert (Path(args.output_dir) / "checkpoints" / "step-2" / "state.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("left", ["checkpoints", "adapter"])
def test_auto_deletes_nothing_where_there_is_no_whole_checkpoint(make_args, left):
    args = make_args(max_steps=1)
    train(args)
    folder = Path(args.output_dir)
    for name in {"checkpoints", "adapter"} - {left}:
        shutil.rmtree(folder / name)
    for manifest in folder.glob("checkpoints/step-*/manifest.json"):
        manifest.unlink()
    before = contents(folder)
    auto = dataclasses.replace(args, resume_from_checkpoint="auto", max_steps=2)
    told = "step-1: manifest.json is missing" if left == "checkpoints" else "got adapter and no checkpoint"
    for again in (auto, resolve_resume(auto)):
        with pytest.raises(ConfigError, match=f"{told}.*Nothing was removed"):
            train(again)
    with pytest.raises(ConfigError, match="resume_from_checkpoint and overwrite_output_dir: got both"):
        train(dataclasses.replace(auto, overwrite_output_dir=True))
    assert contents(folder) == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_auto_starts_again_a_run_that_saved_nothing_and_keeps_what_is_there(make_args, capsys):
    args = make_args(resume_from_checkpoint="auto", max_steps=1)
    folder = Path(args.output_dir)
    (folder / "samples" / "mine").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 9}\n{"reward": 9}\n{"step": 2, "rew')
    (folder / "config.yaml").write_text("max_steps: 1\n")
    assert train(args) == [1]
    assert "holds a run without a checkpoint: starting it again, and keeping what is there" in capsys.readouterr().out
    assert (folder / "samples" / "mine").is_dir()
    assert (folder / "metrics.dropped.jsonl").read_text() == '{"step": 1, "reward": 9}\n'


def test_a_disk_that_does_not_answer_is_not_damage(make_args):
    """/proc/self/mem is there and cannot be read, as a file of a network disk that is gone."""
    args = make_args(max_steps=1)
    train(args)
    before = contents(Path(args.output_dir))
    manifest = Path(args.output_dir) / "checkpoints" / "step-1" / "manifest.json"
    manifest.rename(manifest.with_name("kept"))
    manifest.symlink_to("/proc/self/mem")
    for which in ("auto", "latest", str(manifest.parent)):
        with pytest.raises(OSError, match="Input/output error"):
            train(dataclasses.replace(args, resume_from_checkpoint=which))
    manifest.with_name("kept").rename(manifest)
    assert contents(Path(args.output_dir)) == before


def test_seconds_of_a_run_are_those_of_all_parts(make_args, capsys, monkeypatch):
    args = make_args(max_steps=1)
    RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS).train()
    first = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(r"1 process on cpu \(.+\), base in float32, adapter in float32", first)
    path = Path(args.output_dir) / "checkpoints" / "step-1"
    state = json.loads((path / "state.json").read_text())
    assert state["seconds"] > 0
    for seconds, least in ((1e6, 1e6), (None, 7e5)):  # earlier versions saved none
        kept = {name: value for name, value in state.items() if name != "seconds"}
        (path / "state.json").write_text(json.dumps(kept | ({"seconds": seconds} if seconds else {})))
        (path.parents[1] / "metrics.jsonl").write_text('{"step": 1, "seconds": 7e5}\n')
        write_manifest(path)
        again = dataclasses.replace(args, resume_from_checkpoint="latest")
        summary = RewardGradientTrainer(tiny_pipeline(), redness, again, PROMPTS).train()
        assert least < summary["seconds"] < 1.5 * least, "once each"


def test_resolve_resume_says_where_from_and_what_is_no_longer_the_same(make_args, capsys):
    args = make_args(max_steps=1, learning_rate=0.5)
    train(args)
    again = dataclasses.replace(args, resume_from_checkpoint="latest")
    assert "Going on" not in capsys.readouterr().out
    train(again)
    told = capsys.readouterr().out
    assert "checkpoints/step-1, step 1 of 1; no step is left, max_steps says how many the whole run has." in told
    assert "Other" not in told
    train(dataclasses.replace(again, max_steps=2, learning_rate=0.25))
    told = capsys.readouterr().out
    assert "step 1 of 2. Other settings than before: learning_rate 0.5 -> 0.25, max_steps 1 -> 2." in told
    assert "Processes" not in told


def test_inputs_that_changed_in_place_are_said_used_and_measured_again(make_args, tmp_path, monkeypatch, capsys):
    """The model's transformer is replaced by one of equal size, with the time of the first."""
    for name, prompts in (("train.txt", PROMPTS[:3]), ("held_out.txt", PROMPTS[3:5])):
        (tmp_path / name).write_text("\n".join(prompts))
    (tmp_path / "own.py").write_text(
        "def redness(video, prompts, weights=None):\n    return (video[:, 0] - video[:, 2]).mean((1, 2, 3)) * 10\n"
    )
    (tmp_path / "weights.pt").write_bytes(b"one")
    tiny_pipeline().save_pretrained(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "prompts": "train.txt", "eval_prompts": "held_out.txt"}
    settings |= {"base_dir": str(tmp_path), "calibrate_rewards": 2, "reward_funcs": ["own.py:redness"]}
    settings |= {"num_frames": 1, "num_inference_steps": 1, "num_sample_prompts": 0, "num_diversity_prompts": 0}
    args = make_args(max_steps=1, **settings, reward_kwargs={"redness": {"weights": "weights.pt"}})
    folder = Path(args.output_dir)
    measured, evaluate = [], HeldOut.evaluate
    monkeypatch.setattr(HeldOut, "evaluate", lambda self, n, *rest: measured.append(n) or evaluate(self, n, *rest))

    def go_on(steps, pipe=None) -> tuple[str, RewardGradientTrainer]:
        capsys.readouterr(), measured.clear()
        more = dataclasses.replace(args, max_steps=steps, resume_from_checkpoint="latest")
        trainer = RewardGradientTrainer(pipe, args=more)
        trainer.train()
        return capsys.readouterr().out, trainer

    RewardGradientTrainer(tiny_pipeline(), args=args).train()
    calibrated = (folder / "calibration.json").read_bytes()
    assert "Other content" not in go_on(2, tiny_pipeline())[0]
    assert measured == ["tuned"]
    assert (folder / "calibration.json").read_bytes() == calibrated

    (tmp_path / "train.txt").write_text("\n".join(PROMPTS[2:4]))
    told, trainer = go_on(3, tiny_pipeline())
    assert re.search(r"than before: prompts \(3 prompts, digest \w+ -> 2 prompts, digest \w+\)\. The run goes on", told)
    assert trainer.batches.prompts == PROMPTS[2:4]
    assert measured == ["tuned"]
    assert (folder / "calibration.json").read_bytes() != calibrated

    weights = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    changes = {
        "eval_prompts": lambda: (tmp_path / "held_out.txt").write_text("\n".join(PROMPTS[:2])),
        "reward redness: weights.pt": lambda: (tmp_path / "weights.pt").write_bytes(b"two"),
        "reward redness": lambda: (tmp_path / "own.py").open("a").write("# another version\n"),
        "model": lambda: replace_weights(weights),
    }
    for steps, (name, change) in enumerate(changes.items(), 4):
        change()
        told, _ = go_on(steps, None if name == "model" else tiny_pipeline())
        assert re.search(rf"Other content than before: {name} \([^()]+ -> [^()]+\)\. ", told), told
        assert measured == ["base", "tuned"], name


def replace_weights(path: Path) -> None:
    """Other weights in a file of the same size and time."""
    before = path.stat()
    tiny_transformer(seed=1).save_pretrained(path.parent)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


@pytest.mark.parametrize(
    ("processes", "settings", "told"),
    [
        (2, {}, "Processes: 4 -> 2, samples of a step: 8 -> 4."),
        (2, {"gradient_accumulation_steps": 2}, "Processes: 4 -> 2, samples of a step: 8 as before."),
        (4, {"guidance_parallel": 2}, "Processes: 4 -> 4, samples of a step: 8 -> 4."),
        (4, {"learning_rate": 0.1}, None),
    ],
)
def test_another_number_of_processes_is_said_with_what_it_does_to_a_step(
    make_args, monkeypatch, processes, settings, told
):
    before = make_args(per_device_train_batch_size=2)
    saved = {"step": 1, "settings": vars(before), "processes": 4}
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    message = resume_message(Path("step-1"), saved, dataclasses.replace(before, **settings), {})
    assert message.endswith(f" {told}") if told else "Processes" not in message


@pytest.mark.parametrize(
    ("saved", "steps", "is_said"),
    [({"drift_weighting": "kl"}, 2, True), ({}, 2, False), ({"drift_weighting": "kl"}, None, False)],
)
def test_a_run_whose_prefix_was_spaced_evenly_is_told_so(make_args, saved, steps, is_said):
    args = make_args(prefix_steps=steps)
    message = resume_message(Path("step-1"), {"step": 1, "settings": vars(args) | saved}, args, {})
    assert ("prefix_steps keeps more of the first steps than it did" in message) == is_said


def test_a_checkpoint_whose_blocks_were_trained_whole_is_refused(make_args):
    args = make_args(max_steps=1)
    train(args)
    path = Path(args.output_dir) / "checkpoints" / "step-1" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"settings": state["settings"] | {"train_blocks": ["transformer_blocks.0"]}}))
    write_manifest(path.parent)
    with pytest.raises(ConfigError, match=r"step-1: train_blocks: got \['transformer_blocks.0'\], which this version"):
        train(dataclasses.replace(args, max_steps=2, resume_from_checkpoint="latest"))


def test_a_process_hashes_the_checkpoint_that_it_resumes_from_once(make_args, monkeypatch):
    args = make_args(max_steps=1)
    train(args)
    hashed, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: hashed.append(file.name) or digest(file, kind))
    io._hash.cache_clear()  # as in a new process
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
