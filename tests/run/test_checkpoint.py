"""Checkpoints are whole or absent, hold everything, and are found again."""

import errno
import json
import os
import resource
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_transformer

from rlhf.adapter.lora import add_adapter, lora_config
from rlhf.adapter.masters import MasterWeights
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.io import DamagedFileError
from rlhf.run.checkpoint import (
    SavingError,
    checkpoints,
    damage,
    find_checkpoint,
    load_checkpoint,
    load_vector,
    newest_undamaged_checkpoint,
    read_state,
    save_checkpoint,
)


def trained(updates: int, seed: int = 0, **average):
    """MasterWeights and an optimizer after steps on gradients that depend on the step alone."""
    transformer = tiny_transformer()
    add_adapter(transformer, lora_config(RewardGradientConfig(lora_rank=2)), seed)
    masters = MasterWeights(transformer, **average)
    optimizer = torch.optim.AdamW([masters.vector], lr=1e-2, weight_decay=0.1, fused=True)
    update(masters, optimizer, range(updates))
    return masters, optimizer


def update(masters, optimizer, steps) -> None:
    for step in steps:
        masters.vector.grad = torch.randn(masters.vector.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    masters.write()


@pytest.mark.parametrize("updates", [0, 3])
def test_training_goes_on_from_a_checkpoint_to_the_last_bit(tmp_path, updates):
    masters, optimizer = trained(updates)
    path = save_checkpoint(tmp_path, updates, masters, optimizer, {"note": 1, "settings": {}})
    update(masters, optimizer, range(updates, 6))

    other, other_optimizer = trained(min(updates, 2), seed=9)  # wrong numbers, to be replaced
    progress = {"step": updates, "optimizer_updates": updates}
    assert load_checkpoint(path, other, other_optimizer) == progress | {"note": 1, "settings": {}}
    assert all(torch.equal(p, piece) for p, piece in zip(other.params, other.named(other.vector).values(), strict=True))
    update(other, other_optimizer, range(updates, 6))
    assert torch.equal(masters.vector, other.vector)


def test_the_average_goes_on_and_begins_at_the_weights_where_none_was_kept(tmp_path):
    masters, optimizer = trained(0, average_decay=0.9)
    masters.average += 1
    path = save_checkpoint(tmp_path, 1, masters, optimizer, {"settings": {}})
    other, _ = trained(0, average_decay=0.5)
    load_checkpoint(path, other, optimizer)
    assert torch.equal(other.average, masters.average)
    (path / "average.safetensors").unlink()
    load_checkpoint(path, other, optimizer)
    assert torch.equal(other.average, masters.vector)


def test_nothing_is_pickled_and_no_unfinished_folder_stays(tmp_path):
    path = save_checkpoint(tmp_path, 5, *trained(1), {})
    files = ["adapter.safetensors", "manifest.json", "optimizer.safetensors", "state.json"]
    assert sorted(p.name for p in path.iterdir()) == files
    assert [p.name for p in tmp_path.iterdir()] == ["step-5"]
    written = path.stat().st_ino
    save_checkpoint(tmp_path, 5, *trained(2), {})
    assert path.stat().st_ino == written, "a whole one is never in danger"


GOOD = '{"step": 1, "optimizer_updates": 1, "settings": {}}'
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("function", ["_flush", "save_file"])
def test_a_full_disk_is_named_and_leaves_the_older_checkpoint_as_the_latest(tmp_path, monkeypatch, function):
    masters, optimizer = trained(1)
    save_checkpoint(tmp_path, 1, masters, optimizer, {})
    monkeypatch.setattr(f"rlhf.run.checkpoint.{function}", lambda *_: (_ for _ in ()).throw(FULL))
    with pytest.raises(SavingError, match="step-2 could not be written: the disk is full. Free some space"):
        save_checkpoint(tmp_path, 2, masters, optimizer, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    monkeypatch.undo()
    save_checkpoint(tmp_path, 2, masters, optimizer, {})
    assert [p.name for p in checkpoints(tmp_path)] == ["step-1", "step-2"]


def test_a_file_that_the_system_refuses_to_write_is_a_saving_error_too(tmp_path):
    """By a real limit of the system: files of this process may not grow beyond a kilobyte."""
    masters, optimizer = trained(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(SavingError, match="could not be written"):
            save_checkpoint(tmp_path, 2, masters, optimizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_no_manifest_looks_after_is_told_if_it_is_damaged(tmp_path):
    """The best one, of which a kill may leave a half."""
    masters, _ = trained(0)
    (tmp_path / "masters.safetensors").write_bytes(b"half")
    with pytest.raises(DamagedFileError, match=r"masters\.safetensors: got a damaged file"):
        load_vector(tmp_path / "masters.safetensors", masters, masters.vector)


def truncate(path):
    data = (path / "optimizer.safetensors").read_bytes()
    (path / "optimizer.safetensors").write_bytes(data[: len(data) // 2])


def flip(path):
    data = bytearray((path / "adapter.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "adapter.safetensors").unlink()
    (path / "adapter.safetensors").write_bytes(data)
    os.utime(path / "adapter.safetensors", ns=(0, 0))  # a clock may not tell it from the one before


DAMAGES = [
    (truncate, "optimizer.safetensors is damaged"),
    (flip, "adapter.safetensors is damaged"),
    (lambda path: (path / "adapter.safetensors").unlink(), "adapter.safetensors is missing"),
    (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing or damaged"),
    (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is missing or damaged"),
    *(
        (lambda path, text=text: (path / "manifest.json").write_text(text), "manifest.json is missing or damaged")
        for text in ("[1]", "{}", '{"files": {}}', '{"files": [1]}', "null", "[" * 10**5)
    ),
]


@pytest.mark.parametrize(("harm", "told"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, caplog, harm, told):
    folder, (masters, optimizer) = tmp_path / "checkpoints", trained(1)
    for step in (9, 10):
        save_checkpoint(folder, step, masters, optimizer, {})
    assert damage(folder / "step-10") is None
    harm(folder / "step-10")
    assert told in damage(folder / "step-10")
    assert find_checkpoint("latest", tmp_path, quiet=True) == newest_undamaged_checkpoint(folder) == folder / "step-9"
    assert not caplog.text
    assert find_checkpoint("latest", tmp_path) == folder / "step-9"
    assert f"{folder / 'step-10'}: {told}" in caplog.text
    assert f"going on from {folder / 'step-9'} instead" in caplog.text
    with pytest.raises(ConfigError, match=f"{told}.*use 'latest'"):
        find_checkpoint(str(folder / "step-10"), tmp_path)

    save_checkpoint(folder, 10, masters, optimizer, {})  # the step is done again, and its checkpoint replaced
    assert damage(folder / "step-10") is None
    for step in (9, 10):
        harm(folder / f"step-{step}")
    with pytest.raises(ConfigError, match=f"got .*step-9: {told}.*; .*step-10: {told}"):
        find_checkpoint("latest", tmp_path)


def test_only_the_newest_are_kept_by_number(tmp_path):
    masters, optimizer = trained(0)
    for step in (2, 9, 10, 11):
        save_checkpoint(tmp_path, step, masters, optimizer, {}, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-10", "step-11"]


def test_damaged_ones_of_later_steps_and_other_folders_do_not_count_as_newest(tmp_path):
    masters, optimizer = trained(0)
    for step in (1, 2, 5):
        save_checkpoint(tmp_path, step, masters, optimizer, {})
    (tmp_path / "step-5" / "adapter.safetensors").write_bytes(b"cut")
    (tmp_path / "step-03").mkdir()
    save_checkpoint(tmp_path, 3, masters, optimizer, {}, keep=1)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-3", "step-5"]
    assert newest_undamaged_checkpoint(tmp_path) == tmp_path / "step-3"


def test_an_old_one_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, caplog):
    masters, optimizer = trained(0)
    save_checkpoint(tmp_path, 1, masters, optimizer, {})
    remove = shutil.rmtree

    def refuse(path, **kwargs):
        if path.name == "step-1":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        remove(path, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert save_checkpoint(tmp_path, 2, masters, optimizer, {}, keep=1) == tmp_path / "step-2"
    assert f"{tmp_path / 'step-1'}: this old checkpoint could not be removed ([Errno 13] Permission" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "null",
        "3",
        "",
        '"x"',
        '{"step": 1}',
        GOOD.replace("1", '"1"'),
        GOOD.replace("{}", "[]"),
        "[" * 10**5,
    ],
)
def test_a_state_that_is_none_is_told(tmp_path, text):
    (tmp_path / "state.json").write_text(GOOD)
    assert read_state(tmp_path)["step"] == 1
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(DamagedFileError, match=r"state.json: got a damaged file .*, expected it as it"):
        read_state(tmp_path)


@pytest.mark.parametrize("tensors", [{}, {"exp_avg.x": torch.zeros(1)}])
def test_moments_of_something_else_are_told(tmp_path, tensors):
    masters, optimizer = trained(1)
    path = save_checkpoint(tmp_path, 1, masters, optimizer, {"settings": {}})
    save_file(tensors, path / "optimizer.safetensors")
    with pytest.raises(DamagedFileError, match=r"optimizer.safetensors: got a damaged file \(KeyError"):
        load_checkpoint(path, masters, optimizer)


def test_latest_is_the_newest_whole_one(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (9, 10):
        save_checkpoint(folder, step, *trained(0), {})
    (folder / "step-11.tmp").mkdir()
    (folder / "step-12").mkdir()  # without a state
    assert [p.name for p in checkpoints(folder)] == ["step-9", "step-10"]
    assert find_checkpoint("latest", tmp_path) == folder / "step-10"
    assert find_checkpoint(str(folder / "step-9"), tmp_path) == folder / "step-9"
    assert json.loads((folder / "step-9" / "state.json").read_text())["step"] == 9
    with pytest.raises(ConfigError, match="got no checkpoint there"):
        find_checkpoint(str(folder / "step-12"), tmp_path)
