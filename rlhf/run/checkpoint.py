"""Checkpoints: written whole or not at all, verified, found and loaded.

checkpoints/step-N/ holds adapter.safetensors (the fp32 masters), average.safetensors and
old.safetensors (their running average and the old policy's, where they are kept),
optimizer.safetensors (AdamW's moments), state.json, and manifest.json with size and hash of each of
these. Nothing is pickled. The frozen base is not part of it.
"""

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from rlhf.config import ConfigError
from rlhf.io import DamagedFileError, file_errors, file_fingerprint, read_object, save_tensors, write_json

if TYPE_CHECKING:  # not for a look at settings: it takes seconds
    from rlhf.adapter.masters import MasterWeights

logger = logging.getLogger(__name__)

MANIFEST, STATE = "manifest.json", "state.json"
NEEDED = {"adapter.safetensors", "optimizer.safetensors", STATE}  # files of every checkpoint
GUARD_STATE = {"best_gain", "best_step", "worse"}  # of `rlhf.training.monitor.Guard`
STATE_TYPES = {  # of state.json: type, and the value where earlier versions have none
    "step": (int, None),
    "optimizer_updates": (int, None),
    "settings": (dict, None),
    "samples": (int, 0),
    "place": (int, 0),
    "processes": (int, 1),
    "seconds": (int | float, 0),
    "guard": (dict | None, None),
    "inputs": (dict, {}),
}
MOMENTS = ("exp_avg", "exp_avg_sq")


class SavingError(RuntimeError):
    """A checkpoint could not be written; older ones are intact."""


def save_checkpoint(
    folder: Path, step: int, masters: "MasterWeights", optimizer: torch.optim.Optimizer, state: dict, keep: int = 0
) -> Path:
    """Write folder/step-N, unless it is there undamaged, and return it.

    The files are written and flushed under step-N.tmp, which is then renamed. A kill at any moment
    leaves step-N either complete or absent.

    Args:
        step: optimizer steps done.
        state: what state.json holds beside step and optimizer updates.
        keep: newest checkpoints that stay; older ones are removed. 0 keeps all.

    Raises:
        SavingError: the files cannot be written; step-N is absent.
    """
    final, unfinished = folder / f"step-{step}", folder / f"step-{step}.tmp"
    try:
        if not final.exists() or damage(final):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            _write_files(unfinished, step, masters, optimizer, state)
            for path in [*unfinished.iterdir(), unfinished]:
                _flush(path)
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            _flush(folder)
        old = _older_than_newest(folder, step, keep)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise SavingError(_write_error(final, error)) from error
    for path in old:
        try:
            shutil.rmtree(path)
        except OSError as error:
            logger.warning(f"{path}: this old checkpoint could not be removed ({error}); remove it yourself")
    return final


def _older_than_newest(folder: Path, step: int, keep: int) -> list[Path]:
    """Return the checkpoints up to `step` but the newest `keep`; [] for 0.

    Those of later steps, from which the run did not resume since they are damaged, do not count.
    """
    saved = [path for path in checkpoints(folder) if int(path.name[5:]) <= step]
    return saved[:-keep] if keep else []


def _write_error(path: Path, error: Exception) -> str:
    """Return the message for a checkpoint that could not be written."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    why = "the disk is full" if full else str(error)
    return f"The checkpoint {path} could not be written: {why}. Free some space or check the disk, then go on."


def _write_files(folder: Path, step: int, masters: "MasterWeights", optimizer, state: dict) -> None:
    """Write a checkpoint's masters, average, moments, state.json and manifest."""
    save_vector(folder / "adapter.safetensors", masters, masters.vector)
    for name, average in _averages(masters):
        save_vector(folder / f"{name}.safetensors", masters, average)
    moments = optimizer.state.get(masters.vector, {})
    named = {f"{key}.{n}": t for key in MOMENTS if moments for n, t in masters.named(moments[key]).items()}
    save_file(_cpu(named), folder / "optimizer.safetensors")
    progress = {"step": step, "optimizer_updates": int(moments.get("step", 0))}
    write_json(folder / STATE, progress | state)
    files = {path.name: file_fingerprint(path) for path in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"files": files, "processes": state.get("processes", 1)})


def _averages(masters: "MasterWeights") -> list[tuple[str, torch.Tensor]]:
    """Return the EMA weights and the old policy's, those that exist, with their file names."""
    kept = ("average", masters.average), ("old", masters.old)
    return [(name, average) for name, average in kept if average is not None]


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, by its manifest; None if nothing is.

    Raises OSError if a file is there and cannot be read now, which says nothing about its content.
    """
    try:
        files = read_object(path / MANIFEST)["files"]
    except (FileNotFoundError, NotADirectoryError, KeyError, DamagedFileError):
        return f"{MANIFEST} is missing or damaged"
    if not isinstance(files, dict) or NEEDED - files.keys():
        return f"{MANIFEST} is missing or damaged"
    for name, expected in files.items():
        try:
            found = file_fingerprint(path / name)
        except FileNotFoundError:
            return f"{name} is missing"
        if found != expected:
            written = expected.get("bytes") if isinstance(expected, dict) else None
            return f"{name} is damaged ({found['bytes']} bytes, {written} were written)"
    return None


def save_vector(path: Path, masters: "MasterWeights", vector: torch.Tensor) -> None:
    """Write a flat vector of the masters to a safetensors file, by parameter name.

    `rlhf.adapter.lora_file.read_lora` reads it as a LoRA.
    """
    save_tensors(path, masters.named(vector), masters.metadata())


def load_vector(path: Path, masters: "MasterWeights", vector: torch.Tensor) -> None:
    """Fill a flat vector of the masters from a file of `save_vector`.

    Raises DamagedFileError, and ConfigError for an adapter of another kind or rank.
    """
    with file_errors(path):
        tensors = load_file(path)
    try:
        masters.load(vector, tensors)
    except ValueError as error:  # the file is whole
        raise ConfigError([f"peft_config: {path}: {error}"]) from None


def _cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return detached, contiguous copies on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _flush(path: Path) -> None:
    """Flush the file, or the folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_checkpoint(path: Path, masters: "MasterWeights", optimizer: torch.optim.Optimizer) -> dict:
    """Fill masters, module and optimizer from a checkpoint; return its state.json.

    Raises DamagedFileError, and ConfigError for an adapter of another kind, rank or scale.
    """
    state = read_state(path)
    load_vector(path / "adapter.safetensors", masters, masters.vector)
    with safe_open(path / "adapter.safetensors", "pt") as file:
        masters.require_alphas(file.metadata() or {})
    masters.write()
    for name, average in _averages(masters):  # it starts at the weights if the run kept none before
        file = path / f"{name}.safetensors"
        load_vector(file if file.exists() else path / "adapter.safetensors", masters, average)
    if state["optimizer_updates"]:
        with file_errors(path / "optimizer.safetensors"):
            saved = load_file(path / "optimizer.safetensors")
            _load_moments(saved, masters, optimizer, state["optimizer_updates"])
    return state


def _load_moments(saved: dict[str, torch.Tensor], masters: "MasterWeights", optimizer, updates: int) -> None:
    """Fill AdamW's moments from tensors by parameter name, and its number of updates."""
    moments = {key: torch.empty_like(masters.vector, requires_grad=False) for key in MOMENTS}
    for key, vector in moments.items():
        masters.load(vector, {n: saved[f"{key}.{n}"] for n in masters.names})
    moments["step"] = torch.tensor(float(updates))
    optimizer.load_state_dict({"state": {0: moments}, "param_groups": optimizer.state_dict()["param_groups"]})


def read_state(path: Path) -> dict:
    """Return a checkpoint's state.json: step, settings, state of the batches and the guard.

    Raises DamagedFileError, also for values of a wrong type and missing ones of the guard.
    """
    state = read_object(path / STATE)
    with file_errors(path / STATE):
        for name, (kind, default) in STATE_TYPES.items():
            if not isinstance(value := state.get(name, default), kind) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}")
        if (guard := state.get("guard")) and (missing := GUARD_STATE - guard.keys()):
            raise KeyError(", ".join(missing))
    return state


def step_folders(folder: Path) -> list[Path]:
    """Return the folders step-N in folder, oldest first, whatever they hold."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    numbers = sorted({int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdecimal()})
    return [folder / f"step-{number}" for number in numbers]


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in folder, oldest first, damaged ones included."""
    return [path for path in step_folders(folder) if (path / STATE).exists()]


def newest_undamaged_checkpoint(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint in folder, None if there is none."""
    return next((path for path in reversed(checkpoints(folder)) if not damage(path)), None)


def find_checkpoint(which: str, output_dir: str | Path, quiet: bool = False) -> Path:
    """Return the checkpoint that resume_from_checkpoint names: a path, or "latest".

    "latest" is the newest undamaged one; unless quiet, each newer one is logged as a warning.
    Raises ConfigError for no checkpoint, or a damaged one.
    """
    folder = Path(output_dir) / "checkpoints"
    if which == "latest":
        return _require_newest_undamaged(folder, quiet)
    if (Path(which) / "checkpoints").is_dir():
        newest = newest_undamaged_checkpoint(Path(which) / "checkpoints")
        expected = f"expected one of its checkpoints, such as {newest}; name that"
        raise ConfigError([f"resume_from_checkpoint={which!r}: got the folder of a run, {expected}"])
    if not (Path(which) / STATE).is_file():
        expected = f"expected a folder such as {folder / 'step-50'}, or 'latest'; correct the path"
        raise ConfigError([f"resume_from_checkpoint={which!r}: got no checkpoint there, {expected}"])
    if wrong := damage(Path(which)):
        cure = "expected a whole one; use 'latest', which takes the newest of these"
        raise ConfigError([f"resume_from_checkpoint={which!r}: {wrong}, {cure}"])
    return Path(which)


def _require_newest_undamaged(folder: Path, quiet: bool) -> Path:
    """Return the newest undamaged checkpoint; warn of newer ones, raise ConfigError for none."""
    every, found = checkpoints(folder), newest_undamaged_checkpoint(folder)
    if found is None:
        got = "; ".join(f"{path}: {damage(path)}" for path in every) or "no checkpoint"
        expected = f"expected folders step-N in {folder}; correct output_dir, or set overwrite_output_dir instead"
        raise ConfigError([f"resume_from_checkpoint='latest': got {got}, {expected}"])
    for path in every[every.index(found) + 1 :] if not quiet else []:
        logger.warning(f"{path}: {damage(path)}; going on from {found} instead")
    return found
