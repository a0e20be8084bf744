"""Prompts: read from files, built-in sets or datasets, and their order in training."""

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import torch

from rlhf.config import ConfigError
from rlhf.device import generator

BUILT_IN_SETS = {"nano_train": "train_prompts", "nano_held_out": "held_out_prompts"}


def load_prompts(name: str, base_dir: str | Path | None, count: int, seed: int = 0) -> list[str]:
    """Return the prompts that a setting names: `count` of a built-in set, or all of a file.

    A text file holds one prompt a line; empty lines and lines that start with # are left out. A
    .jsonl file holds rows such as {"prompt": "a cat"}, or strings in quotes. seed: of the draw.
    Raises ConfigError for a file that is absent, empty, not UTF-8 or malformed.
    """
    if name in BUILT_IN_SETS:
        from rlhf.nano import world

        return getattr(world, BUILT_IN_SETS[name])(count, seed)
    path = find_prompt_file(name, base_dir)
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without the mark that Windows begins a file with
    except UnicodeDecodeError as error:
        raise ConfigError([f"prompt file {path}: got {error.reason}, expected UTF-8; save it as UTF-8"]) from error
    lines = [line.strip() for line in text.split("\n")]
    if path.suffix == ".jsonl":
        return _parse_rows(lines, path)
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ConfigError([f"prompt file {path}: got no prompts, expected one a line; write at least one"])
    return prompts


def _parse_rows(lines: list[str], path: Path) -> list[str]:
    """Parse JSON lines into prompts; raise ConfigError with the number of a malformed line."""
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line else []
        except ValueError as error:
            expected = 'expected a row such as {"prompt": "a cat"}'
            raise ConfigError([f"prompt file {path}, line {number}: got {error}, {expected}; correct it"]) from None
    return as_prompts(rows, f"prompt file {path}")


def find_prompt_file(name: str, base_dir: str | Path | None) -> Path:
    """Return the file's path in base_dir, else in the working directory. Raises ConfigError."""
    places = list(dict.fromkeys([(Path(base_dir or ".") / name).resolve(), Path(name).resolve()]))
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        looked = " or ".join(str(path) for path in places)
        sets = ", ".join(BUILT_IN_SETS)
        raise ConfigError(
            [f"prompts {name!r}: got no file at {looked}, expected a text file or one of {sets}; correct the path"]
        )
    return found


def as_prompts(dataset: Iterable, name: str = "dataset") -> list[str]:
    """Return the prompts of strings, or of rows with a "prompt", such as a `datasets.Dataset`.

    name: of the argument, for errors. Raises ConfigError for no rows, other rows, and for tables
    and dicts of sets, which yield mere names.
    """
    if isinstance(dataset, Mapping) or getattr(dataset, "ndim", 1) != 1:
        keys = ", ".join(map(repr, list(dataset)[:5]))
        expected = "expected strings or rows with a 'prompt'; pass one of these"
        raise ConfigError([f"{name}: got a {type(dataset).__name__} of {keys}, {expected}"])
    rows = [] if isinstance(dataset, str) else list(dataset)
    prompts = [row.get("prompt") if isinstance(row, Mapping) else row for row in rows]
    wrong = next((row for row, prompt in zip(rows, prompts, strict=True) if not isinstance(prompt, str)), None)
    if not prompts or wrong is not None:
        got = f"the row {wrong!r}" if prompts else f"the string {dataset!r}" if isinstance(dataset, str) else "no rows"
        expected = "expected strings or rows with a 'prompt'; pass a list of at least one prompt"
        raise ConfigError([f"{name}: got {got}, {expected}"])
    return prompts


def shuffled_indices(num_prompts: int, seed: int, start: int, count: int) -> list[int]:
    """Return prompt indices at positions start .. start+count-1 of endless shuffled epochs.

    A pure function of its arguments: a resumed run, on any number of processes, keeps the order.
    """
    places = range(start, start + count)
    return [_permutation(num_prompts, seed, at // num_prompts)[at % num_prompts] for at in places]


@lru_cache(maxsize=4)
def _permutation(num_prompts: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(num_prompts, generator=generator("prompt order", seed, epoch)).tolist()
