"""Files of runs and checkpoints: readers that name a damaged file, and one atomic write."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError

if TYPE_CHECKING:
    import torch

CONTENT_ERRORS = (
    *(ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, re.error),
    *(yaml.YAMLError, SafetensorError),
)
SMALL_FILE = 2**24  # bytes, up to which a file is read to be told from another version of it
MAX_YAML_DEPTH, MAX_YAML_VALUES, MAX_YAML_LENGTH = 32, 20_000, 10**6  # far above any file of settings


class DamagedFileError(ValueError):
    """A file whose content is not what was written, as after a kill or on a full disk."""


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn errors of reading the file inside the block into DamagedFileError with the path."""
    try:
        yield
    except DamagedFileError:
        raise
    except CONTENT_ERRORS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DamagedFileError(
            f"{path}: got a damaged file ({reason}), expected it as it was written; restore it, or "
            "remove it to go on without"
        ) from error


def load_yaml(text: str) -> Any:
    """Return the content of a YAML document. Raises `CONTENT_ERRORS`.

    Raises yaml.YAMLError, before it is built, for one of more than MAX_YAML_LENGTH characters, one
    that nests deeper than MAX_YAML_DEPTH or refers to itself, and one that has more than
    MAX_YAML_VALUES values once its aliases are expanded.
    """
    if len(text) > MAX_YAML_LENGTH:
        raise yaml.YAMLError(f"{len(text)} characters, expected settings")
    sizes, opened, total = {}, [], 0  # values below an anchor; anchor and total at each open collection's begin
    for event in yaml.parse(text, yaml.SafeLoader):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == name for name, _ in opened):
                raise yaml.MarkedYAMLError(
                    problem=f"*{anchor} refers to itself, expected settings", problem_mark=event.start_mark
                )
            total += sizes.get(anchor, 0)
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((anchor, total))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            sizes[anchor] = total - before + 1
        total += isinstance(event, yaml.NodeEvent)
        if len(opened) > MAX_YAML_DEPTH or total > MAX_YAML_VALUES:
            much = f"more than {MAX_YAML_VALUES} values" if total > MAX_YAML_VALUES else f"{len(opened)} nested levels"
            raise yaml.MarkedYAMLError(problem=f"{much}, expected settings", problem_mark=event.start_mark)
    return yaml.safe_load(text)


def read_object(path: Path) -> dict:
    """Return the object of a JSON file or the mapping of a YAML file. Raise DamagedFileError."""
    with file_errors(path):
        text = path.read_text(encoding="utf-8")
        content = load_yaml(text) if path.suffix == ".yaml" else json.loads(text)
        if not isinstance(content, dict):
            raise TypeError(f"{type(content).__name__} in place of keys and values")
    return content


def run_of_checkpoint(checkpoint: str | Path) -> Path:
    """Return the folder of a checkpoint's run: two above it, as it is named or behind its links."""
    checkpoint = Path(checkpoint).expanduser()
    named = Path(os.path.abspath(checkpoint)).parent.parent
    return named if (named / "config.yaml").is_file() else checkpoint.resolve().parent.parent


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text, with or without a byte order mark.

    Only line feeds (CRLF, CR, too) end a line: JSON may hold U+2028 and U+0085.
    """
    return path.read_text(encoding="utf-8-sig").split("\n")


def read_rows(path: Path) -> list[dict]:
    """Return the objects of a JSON Lines file. Raise DamagedFileError."""
    with file_errors(path):
        lines = read_lines(path)
        return [json.loads(line) for line in lines if line.strip()]


def read_log(path: Path) -> list[dict]:
    """Return the objects of a JSON Lines log, [] without the file; skip lines cut short by a kill.

    Raises DamagedFileError for a file that is not text.
    """
    with file_errors(path):
        lines = read_lines(path) if path.is_file() else []
    return [row for row in map(_parse_line, lines) if isinstance(row, dict)]


def _parse_line(line: str) -> Any:
    """Return the value of a JSON line, None if it is malformed."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


@contextmanager
def write_whole(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` after a block without an error.

    So nobody ever sees half a file. The folder is made. The temporary name has the same ending.

    Args:
        path: the file to write.
        shared: several processes may write this path at once, so each gets its own temporary name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha1(path.name.encode()).hexdigest()[:12]  # a name may be as long as allowed
    owner = f"-{os.getpid()}" if shared else ""
    unfinished = path.with_name(f".unfinished-{digest}{owner}{path.suffix}")
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write a JSON file, whole or not at all."""
    with write_whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_fingerprint(path: Path) -> dict:
    """Return a file's size and SHA-256. A process hashes each version of a file once."""
    status = path.stat()
    version = status.st_mtime_ns, status.st_ctime_ns, status.st_ino
    return _hash(path.absolute(), status.st_size, *version)


@cache
def _hash(path: Path, size: int, *_version: int) -> dict:
    """Return size and SHA-256; cached by path, size and the file's times (`_version`)."""
    return {"bytes": size, "sha256": file_sha256(path)}


def describe_files(*paths: Path) -> str:
    """Return number, bytes and digest of files, and of those in folders, found by name.

    The digest changes with every file: up to SMALL_FILE bytes by its content, above by its size and
    time, since weights take minutes to read. Hidden files and pages (.md) do not count.
    """
    files, total = {}, 0
    for name, path in sorted((name, path) for given in paths for name, path in _files_below(given)):
        status = path.stat()
        total += status.st_size
        small = status.st_size <= SMALL_FILE
        files[name] = file_fingerprint(path) if small else [status.st_size, status.st_mtime_ns]
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
    return f"{len(files)} file{'s' * (len(files) != 1)}, {total} bytes, digest {digest}"


def _files_below(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and path of a file, or of each in a folder and in the folders that it links to."""
    if path.is_file():
        yield path.name, path
    seen = set()
    for folder, names, files in os.walk(path, followlinks=True):
        seen.add(os.path.realpath(folder))
        names[:] = [n for n in names if not n.startswith(".") and os.path.realpath(f"{folder}/{n}") not in seen]
        for file in (Path(folder, name) for name in files if not name.startswith(".")):
            if file.suffix != ".md" and file.is_file():
                yield file.relative_to(path.parent).as_posix(), file


def save_tensors(
    path: Path, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str], shared: bool = False
) -> None:
    """Write a safetensors file, whole or not at all: equal content gives equal bytes.

    safetensors shuffles the metadata, so they are sorted in the header afterwards. shared: as in
    `write_whole`.
    """
    from safetensors.torch import save_file  # torch takes seconds to import

    with write_whole(path, shared) as unfinished:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished, metadata)
        with unfinished.open("r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
            assert len(text) == size, "both write JSON alike"
            file.seek(8)
            file.write(text)


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Write a JSON Lines file, whole or not at all."""
    with write_whole(path) as unfinished:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        unfinished.write_text(lines, encoding="utf-8")


def single_line(prompt: str) -> str:
    """Return the prompt without line breaks, as prompts.txt has it."""
    return " ".join(prompt.splitlines())
