"""Files of checkpoints and runs, which a kill, a full disk or an editor may have damaged: read whole, or named."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from safetensors import SafetensorError

OF_CONTENT = (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, SafetensorError)


class DamagedFileError(ValueError):
    """A file does not hold what it should: which one, why, and what to do."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Inside, the file is read, and nothing else done. Raises DamagedFileError where that fails for its content."""
    try:
        yield
    except DamagedFileError:
        raise
    except OF_CONTENT as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DamagedFileError(
            f"{path}: got a damaged file ({why}), expected it as it was written; restore it, or remove it to go on "
            "without"
        ) from error


def read_object(path: Path) -> dict:
    """The object in a JSON file, or the mapping in a YAML one. Raises DamagedFileError."""
    with reading(path):
        text = path.read_text(encoding="utf-8")
        found = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        if not isinstance(found, dict):
            raise TypeError(f"{type(found).__name__} in place of keys and values")
    return found


def read_rows(path: Path) -> list[dict]:
    """The objects in a file of one a line. Raises DamagedFileError."""
    with reading(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_log(path: Path) -> list[dict]:
    """The objects in a log of one a line, [] without the file, without what else a kill leaves in it.

    Raises DamagedFileError for one that is no text.
    """
    with reading(path):
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [row for row in map(_parsed, lines) if isinstance(row, dict)]


def _parsed(line: str):
    try:
        return json.loads(line)
    except ValueError:
        return None
