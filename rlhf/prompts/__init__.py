"""Prompts: read from files, built-in sets or datasets, and their order in training."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import torch

from rlhf.config import ConfigError
from rlhf.device import generator
from rlhf.prompts.files import as_prompt, read_prompt_file
from rlhf.types import Prompt, row_of

BUILT_IN_SETS = {"nano_train": "train_prompts", "nano_held_out": "held_out_prompts"}


def load_prompts(name: str, base_dir: str | Path | None, count: int, seed: int = 0) -> list[str]:
    """Return the prompts that a setting names: `count` of a built-in set, or all of a file.

    `rlhf.prompts.files` says which files can be read. Their prompts are `rlhf.types.Prompt`s, which
    have the further fields of their rows. seed: of the draw. Raises ConfigError for a file that is
    absent, or that `read_prompt_file` refuses.
    """
    if name in BUILT_IN_SETS:
        from rlhf.nano import world

        return getattr(world, BUILT_IN_SETS[name])(count, seed)
    return read_prompt_file(find_prompt_file(name, base_dir))


def find_prompt_file(name: str, base_dir: str | Path | None) -> Path:
    """Return the file's path in base_dir, else in the working directory. Raises ConfigError."""
    places = list(dict.fromkeys([(Path(base_dir or ".") / name).resolve(), Path(name).resolve()]))
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        looked = " or ".join(str(path) for path in places)
        sets = ", ".join(BUILT_IN_SETS)
        expected = f"expected a text file or one of {sets}; correct the path, or base_dir"
        raise ConfigError([f"prompts {name!r}: got no file at {looked}, {expected}"])
    return found


def as_prompts(dataset: Iterable, name: str = "dataset") -> list[Prompt]:
    """Return strings, or rows with a "prompt", as Prompts: strings that keep their row's fields.

    name: of the argument, for errors. Raises ConfigError for no rows, other rows, and for tables
    and dicts of sets, which yield mere names.
    """
    expected = "expected strings or rows with a 'prompt'"
    if isinstance(dataset, Mapping) or getattr(dataset, "ndim", 1) != 1:
        keys = ", ".join(map(repr, list(dataset)[:5]))
        raise ConfigError([f"{name}: got a {type(dataset).__name__} of {keys}, {expected}; pass one of these"])
    rows = [] if isinstance(dataset, str) else list(dataset)
    if not rows:
        got = f"the string {dataset!r}" if isinstance(dataset, str) else "no rows"
        raise ConfigError([f"{name}: got {got}, {expected}; pass a list of at least one prompt"])
    return [as_prompt(row, f"{name}, row {i}") for i, row in enumerate(rows)]


def unread_message(prompts: Iterable[str], guided: bool) -> str | None:
    """Return a line about the fields of the prompts' rows that nothing has read; None for none.

    guided: whether guidance reads `negative_prompt`.
    """
    rows = [(row_of(prompt), getattr(prompt, "read", ())) for prompt in prompts]
    read = {"prompt", *["negative_prompt"] * guided, *(name for _, names in rows for name in names)}
    unread = [name for name in dict.fromkeys(name for row, _ in rows for name in row) if name not in read]
    return f"Fields of the prompts' rows that nothing has read: {', '.join(unread)}." if unread else None


def shared_message(train: Iterable[str], held_out: list[str]) -> str | None:
    """Return a line about held-out prompts that are trained on, too; None for none."""
    trained = set(train)
    if not (shared := sum(prompt in trained for prompt in held_out)):
        return None
    return f"{shared} of {len(held_out)} held-out prompts are trained on, too: their gain says nothing about new ones."


def shuffled_indices(num_prompts: int, seed: int, start: int, count: int) -> list[int]:
    """Return prompt indices at positions start .. start+count-1 of endless shuffled epochs.

    A pure function of its arguments: a resumed run, on any number of processes, keeps the order.
    """
    places = range(start, start + count)
    return [_permutation(num_prompts, seed, at // num_prompts)[at % num_prompts] for at in places]


@lru_cache(maxsize=4)
def _permutation(num_prompts: int, seed: int, epoch: int) -> list[int]:
    """Return the order of the prompts in an epoch, drawn from seed and epoch."""
    return torch.randperm(num_prompts, generator=generator("prompt order", seed, epoch)).tolist()
