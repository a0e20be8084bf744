"""A file that is damaged is named, with what to do, wherever a command reads it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from scripts import script

from rlhf.config import RewardGradientConfig
from rlhf.evaluation.held_out import Evaluation
from rlhf.evaluation.video_set import read_set
from rlhf.generator.files import SamplingDefaults, model_sizes
from rlhf.generator.loading import load_pipeline
from rlhf.io import DamagedFileError, describe_files
from rlhf.planner.text_encoders import encoder_configs
from rlhf.report.data import Run
from rlhf.run.environment import read_environment
from rlhf.run.folder import read_settings
from rlhf.run.metrics import read_metrics
from rlhf.training.calibrate import CALIBRATION, restore_calibration

HALF = b'{"a": [1, "b'
READERS = {  # by file: what reads it in the folder, and what does not belong there
    "config.yaml": (read_settings, (b"a: [1", b"", b"- 1\n", b"a: \xfc\n")),
    "summary.json": (lambda folder: Run(folder).summary, (HALF, b"", b"[1]", b'"\xfc"')),
    "environment.jsonl": (read_environment, (b'{"a": "\xfc"}\n',)),
    "metrics.jsonl": (read_metrics, (b'{"a": "\xfc"}\n',)),
    "base.safetensors": (lambda folder: Evaluation.load(folder / "base.safetensors"), (b"", HALF, b"\xff" * 200)),
    "prompts.txt": (read_set, (b"no tab\n", b"00\t\xfc\n")),
    "videos.jsonl": (read_set, (b'{"file": "a.mp4", "prompt": "\xfc"}\n',)),
    "sampling.json": (SamplingDefaults.load, (HALF, b"[]")),
}
CASES = [(name, content) for name, (_, contents) in READERS.items() for content in contents]


@pytest.mark.parametrize(("name", "content"), CASES)
def test_what_does_not_belong_there_is_told_with_the_files_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DamagedFileError) as error:
        READERS[name][0](tmp_path)
    assert str(error.value).startswith(f"{tmp_path / name}: got a damaged file (")
    assert "restore it, or remove it to go on without" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("read", [read_environment, read_metrics])
def test_of_a_log_the_whole_lines_count(tmp_path, read):
    """Not one that was half written, also if the next start has gone on in it."""
    row = json.dumps({"step": 1, "started": 1.0, "packages": {}})
    for name in ("environment.jsonl", "metrics.jsonl"):
        (tmp_path / name).write_text(f"{row}\n{row[:5]}{row}\nnull\n{row}\n{row[:-2]}")
    assert read(tmp_path) == [json.loads(row)] * 2


def test_an_evaluation_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "base.safetensors"
    evaluation = Evaluation(["a"], {"r": torch.ones(1)}, torch.zeros(0, dtype=torch.uint8))
    evaluation.save(path)
    before = path.read_bytes()

    def killed(tensors, file, metadata):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluation.save(path)
    assert path.read_bytes() == before


def test_a_calibration_that_is_damaged_is_told(tmp_path, make_args):
    (tmp_path / CALIBRATION).write_bytes(HALF)
    with pytest.raises(DamagedFileError, match=f"{CALIBRATION}: got a damaged file"):
        restore_calibration(None, make_args(output_dir=str(tmp_path)), [])


def test_files_are_told_from_other_versions_by_content_where_small_and_else_by_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.io.SMALL_FILE", 3)
    model, linked = tmp_path / "model", tmp_path / "linked"
    for path, content in ((model / "a.json", b"{}"), (model / "b.bin", b"1" * 9), (linked / "c.bin", b"2" * 9)):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    (model / "vae").symlink_to(linked)
    (linked / "circle").symlink_to(model)
    first = describe_files(model)
    assert first.startswith("3 files, 20 bytes, digest ")

    def moved(path, times) -> str:
        os.utime(path, ns=times)
        return describe_files(model)

    before = (model / "b.bin").stat().st_mtime_ns
    (model / "README.md").write_text("of no effect")
    (model / ".cache").mkdir()
    (model / ".cache" / "x").write_text("of no effect")
    assert moved(model / "a.json", (1, 1)) == first, "small, and the same"
    assert moved(linked / "c.bin", (1, 1)) != first, "older, and behind a link"
    (linked / "c.bin").unlink()
    shutil.copy2(model / "b.bin", linked / "c.bin")
    one, two = moved(linked / "c.bin", (1, before)), moved(linked / "c.bin", (1, before + 1))
    assert len({first, one, two}) == 3, "a nanosecond counts"
    (model / "a.json").write_bytes(b"[]")
    assert describe_files(model) != two
    (linked / "circle").unlink()
    shutil.copytree(model, tmp_path / "there" / "model")
    assert describe_files(tmp_path / "there" / "model") == describe_files(model), "wherever it lies"


@pytest.mark.parametrize("content", [b"{", b"[1]\n", b"null\n", b'{"prompt": "x", "seed": 0}\n', b"\xfc"])
def test_scores_that_are_damaged_are_told(tmp_path, content, capsys):
    good = {"file": "a.mp4", "sha256": "0", "prompt": "x", "seed": 0, "scores": {"r": 1.0}}
    for name, text in (("base", json.dumps(good).encode() + b"\n\n"), ("tuned", content)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.jsonl").write_bytes(text)
    folders = [str(tmp_path / name) for name in ("base", "tuned")]
    compare = script("eval/compare.py").main
    assert compare(folders) == 2
    assert f"{tmp_path / 'tuned' / 'scores.jsonl'}: got a damaged file" in capsys.readouterr().err
    shutil.copy(tmp_path / "base" / "scores.jsonl", tmp_path / "tuned")
    assert compare(folders) == 0, "an empty line is no damage"


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("transformer/config.json", model_sizes),
        ("text_encoder_3/config.json", encoder_configs),
        ("scheduler/scheduler_config.json", load_pipeline),
        ("tokenizer_2/tokenizer.json", load_pipeline),
    ],
)
def test_a_checkpoint_names_the_part_that_is_damaged(tmp_path, tiny_pipe, file, read):
    tiny_pipe.save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(HALF)
    with pytest.raises(ValueError, match=f"^{tmp_path / file.split('/')[0]}.*(damaged|download is complete)"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("eval/report.py", ["{locked}"]),
        ("eval/compare.py", ["{locked}", "{run}"]),
        ("eval/score.py", ["{locked}", "--reward", "flicker"]),
        ("eval/generate.py", ["--from_run", "{locked}", "--output", "{run}/new"]),
        ("eval/vbench.py", ["make", "--full_info", "x", "--from_run", "{locked}", "--output", "{run}/new"]),
    ],
)
def test_what_the_system_refuses_is_told_in_a_line(tmp_path, monkeypatch, capsys, command, flags):
    folders = {name: tmp_path / name for name in ("locked", "run")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "config.yaml").write_text(RewardGradientConfig().to_yaml())
        for name in ("scores.jsonl", "videos.jsonl"):
            (folder / name).write_text("{}\n")
    read = Path.read_text

    def refused(path, **how):
        if path.parent == folders["locked"]:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, **how)

    monkeypatch.setattr(Path, "read_text", refused)  # root may everything
    assert script(command).main([flag.format(**folders) for flag in flags]) == 2
    assert f"{command}: [Errno 13] Permission denied: '{tmp_path}/locked/" in capsys.readouterr().err
