"""Load a reward from its spec: built-in, `module:Class`, `file.py:Class`, entry point or server."""

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

from rewards.catalogue import CATALOGUE, ENTRY_POINT_GROUP, WEIGHTS
from rewards.contract import RewardError, is_url, name_reward_in_errors, reward_time_limit, split_spec
from rewards.isolation import keep_process_state
from rewards.placement import OnDevice, reward_device, without_device
from rewards.remote import Remote, check_url
from rlhf.io import describe_files, file_sha256

IMPORT_TIMEOUT = 300.0  # seconds; imports of large packages from network disks take minutes
LOCAL = "local-dir:"  # open_clip's prefix of folders


def built_in_names() -> list[str]:
    """Return the names of the built-in rewards, sorted."""
    return sorted(CATALOGUE)


def load_reward(
    spec: str, base_dir: str | Path | None = None, *, reward_timeout: float | None = None, **kwargs
) -> Callable:
    """Load the reward that `spec` names, "name=spec" to give it another name.

    A class is instantiated with kwargs; a function gets kwargs bound. The argument `device` places
    the reward on a device of its own, and reaches only rewards that name it themselves. The file of
    the spec and those of kwargs are relative to base_dir (the folder of the config file) or else to
    the working directory. The process keeps its state, whatever the reward's code does to it.
    Raises RewardError, also for an import or a construction that takes longer than reward_timeout
    seconds. By default an import has 300 s and a construction no limit, and so have built-ins.
    """
    name, plain = split_spec(spec)
    try:
        return _load_reward(plain, base_dir, reward_timeout, kwargs)
    except RewardError as error:
        if plain == spec or error.name != plain:
            raise
        cure = error.cure.replace(f"reward_kwargs.{plain}", f"reward_kwargs.{name}")
        raise RewardError(name, got=error.got, expected=error.expected, cure=cure) from error


def _load_reward(spec: str, base_dir: str | Path | None, reward_timeout: float | None, kwargs: dict) -> Callable:
    """Load a checked spec, on the device that kwargs name, if they do."""
    check_spec(spec, base_dir)
    if (device := kwargs.get("device")) is None:
        return _load_unplaced(spec, base_dir, reward_timeout, kwargs)
    reward_device(spec, device)  # before weights are loaded
    return OnDevice(spec, _load_unplaced(spec, base_dir, reward_timeout, kwargs), device)


def _load_unplaced(spec: str, base_dir: str | Path | None, reward_timeout: float | None, kwargs: dict) -> Callable:
    """Construct a class, bind a function or connect to a server, without regard to `device`."""
    kwargs = {key: resolve_paths(value, base_dir) for key, value in kwargs.items()}
    if spec in CATALOGUE:
        _require_weights_path(spec, kwargs)
        return _construct(spec, import_built_in(spec), kwargs)
    if is_url(spec):
        return _construct(spec, Remote, {"url": spec} | kwargs)
    with _import_guard(spec, spec.rsplit(":", 1)[0], reward_timeout or IMPORT_TIMEOUT):
        target = _import_attribute(spec, base_dir) if ":" in spec else _entry_point(spec).load()
    if inspect.isclass(target):
        with reward_time_limit(spec, "constructing it", reward_timeout):
            return _construct(spec, target, kwargs)
    return _bind(spec, target, kwargs)


@contextmanager
def _import_guard(spec: str, where: str, seconds: float = IMPORT_TIMEOUT) -> Iterator[None]:
    """Import in the block: keep the process's state, and turn errors and exits into RewardError.

    The imported code sees an empty command line. seconds: time limit.
    """
    try:
        with keep_process_state(), reward_time_limit(spec, "importing it", seconds):
            sys.argv = [where]
            yield
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        got = f"{type(error).__name__} while importing it: {error}".rstrip(".")
        cure = "correct the code, or install what it imports"
        if isinstance(error, SystemExit):
            cure = 'move what it does as a program below a test of __name__ == "__main__"'
        raise RewardError(spec, got=got, expected=f"{where} to import", cure=cure) from error


def resolve_paths(value: Any, base_dir: str | Path | None) -> Any:
    """Return a value of reward_kwargs with existing paths made absolute, relative ones to base_dir.

    A path is a text with a slash or a suffix; others, such as the name of a dimension, stay.
    """
    if isinstance(value, dict):
        return {key: resolve_paths(inner, base_dir) for key, inner in value.items()}
    if isinstance(value, list):
        return [resolve_paths(inner, base_dir) for inner in value]
    if isinstance(value, str) and base_dir and ("/" in value or Path(value).suffix):
        scheme = LOCAL * value.startswith(LOCAL)
        path = Path(base_dir) / Path(value.removeprefix(scheme)).expanduser()
        return f"{scheme}{path.resolve()}" if os.path.exists(path) else value  # Path.exists raises for long texts
    return value


def check_spec(spec: str, base_dir: str | Path | None = None, kwargs: dict | None = None) -> None:
    """Raise RewardError if `spec` can't name a reward; the reward is not imported.

    Only the parent packages of a module are imported. With kwargs, also raise if a weights file
    that users must supply is missing from them, or if their `device` is not there.
    """
    spec = split_spec(spec)[1]
    if kwargs and kwargs.get("device") is not None:
        reward_device(spec, kwargs["device"])
    if spec in CATALOGUE:
        if kwargs is not None:
            _require_weights_path(spec, kwargs)
        return
    if is_url(spec):
        check_url(spec)
        return
    if ":" not in spec:
        if _entry_point(spec) is None:
            _raise_unknown(spec, base_dir)
        return
    where, attribute = spec.rsplit(":", 1)
    source = _find_file(spec, where, base_dir) if where.endswith(".py") else _module_source(spec, where)
    if source is not None:
        _check_defined(spec, source, attribute)


def import_built_in(name: str) -> Callable:
    """Import the class of a built-in reward."""
    module, attribute = CATALOGUE[name].home.split(":")
    return getattr(importlib.import_module(module), attribute)


def _require_weights_path(name: str, kwargs: dict) -> None:
    """Raise RewardError if kwargs lack the path of weights that the user must supply."""
    entry = CATALOGUE[name]
    if entry.own_path and not kwargs.get(entry.own_path):
        source = entry.weights[-1]
        size, licence = WEIGHTS[source]
        expected = f"the path of {source}: {size}, {licence} (it is never downloaded for you)"
        cure = f"get it and set `{entry.own_path}` in reward_kwargs.{name} to where it is"
        raise RewardError(name, got=f"no `{entry.own_path}`", expected=expected, cure=cure)


def _entry_point(name: str):
    """Return the installed plug-in of this name, None if there is none."""
    return next(iter(entry_points(group=ENTRY_POINT_GROUP, name=name)), None)


def _raise_unknown(spec: str, base_dir) -> NoReturn:
    """Raise RewardError for a spec that names no known reward; suggest the nearest name."""
    if spec.endswith(".py"):
        _raise_name_missing(spec, _find_file(spec, spec, base_dir))
    plugins = [e.name for e in entry_points(group=ENTRY_POINT_GROUP)]
    known = list(dict.fromkeys(built_in_names() + plugins))
    near = difflib.get_close_matches(spec, known, n=1)
    hint = f"The nearest name is {near[0]!r}. " if near else ""
    raise RewardError(
        spec,
        got="a name that is neither built in nor installed",
        expected=f"one of {', '.join(known)}",
        cure=f"{hint}A reward of your own is named 'path/to/file.py:Class', 'package.module:Class' or 'http://HOST:PORT'",
    )


def _raise_name_missing(spec: str, path: Path) -> NoReturn:
    """Raise RewardError for a file without a :NAME; list the names that it defines."""
    names = sorted(_public_names(_parse_source(spec, path)))
    cure = f"name one of these: {', '.join(names) or 'it defines none yet'}"
    raise RewardError(spec, got="a file alone", expected=f"the class or function in it, {spec}:Name", cure=cure)


def _find_file(spec: str, where: str, base_dir) -> Path:
    """Return a path relative to base_dir or the working directory. Raises RewardError."""
    given = Path(where).expanduser()
    places = list(dict.fromkeys([(Path(base_dir or ".") / given).resolve(), given.resolve()]))
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        looked = " or ".join(str(path) for path in places)
        cure = "correct the path; it is relative to the folder of the config file, or to the working directory"
        raise RewardError(spec, got=f"no file at {looked}", expected="a Python file", cure=cure)
    return found


def source_digests(
    specs: list[Any], base_dir: str | Path | None = None, kwargs: dict[str, dict] | None = None
) -> dict[str, str]:
    """Return what identifies the files that define rewards, {} if none do.

    {short name: SHA-256} of the source of rewards other than the built-in ones, after the own name
    of one that was given another; of a server, the digest that it states. {"name: file": digest} of
    what the arguments of rewards name. kwargs: these arguments, by name. Code that a file imports
    does not count.
    """
    digests = {}
    for name, spec in (split_spec(spec) for spec in specs if isinstance(spec, str)):
        if is_url(spec):
            digests[name] = load_reward(spec, base_dir, **(kwargs or {}).get(name, {})).source_digest
            continue
        path, own = _source_file(spec, base_dir), split_spec(spec)[0]
        told = [own] * (name != own) + ([] if path is None else [file_sha256(path)])
        digests |= {name: " ".join(told)} if told else {}
    named = {name: named_files(given, base_dir) for name, given in (kwargs or {}).items()}
    return digests | {f"{name}: {text}": found for name, files in named.items() for text, found in files.items()}


def _source_file(spec: str, base_dir: str | Path | None) -> Path | None:
    """Return the Python file of a reward, None for a built-in one and for one without source."""
    if ":" not in spec and spec not in CATALOGUE and (plugin := _entry_point(spec)):
        spec = plugin.value
    where = spec.rpartition(":")[0]
    if not where:
        return None
    return _find_file(spec, where, base_dir) if where.endswith(".py") else _module_source(spec, where)


def named_files(kwargs: Any, base_dir: str | Path | None = None) -> dict[str, str]:
    """Return `describe_files` of each file and folder that a reward's arguments name."""
    resolved = {text: resolve_paths(text, base_dir) for text in _texts(without_device(kwargs))}
    places = {text: Path(value.removeprefix(LOCAL)).expanduser() for text, value in resolved.items()}
    # Path.exists raises for long texts
    return {text: describe_files(path) for text, path in places.items() if os.path.exists(path)}


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in nested mappings and lists."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
    elif isinstance(value, str) and value:
        yield value


def _module_source(spec: str, module: str) -> Path | None:
    """Return the source file of the module "package.module", None if it has no Python source.

    The module itself is not imported, its parent packages are. Raises RewardError if it is absent.
    """
    with _import_guard(spec, module):  # of parent packages
        try:
            found = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            found = None
    if found is None:
        cure = "install the package or correct the name; a file is named 'path/to/file.py:Class'"
        raise RewardError(spec, got=f"no module {module!r}", expected="an importable module", cure=cure)
    is_source = found.origin is not None and found.origin.endswith(".py")
    return Path(found.origin) if is_source else None


def _check_defined(spec: str, source: Path, attribute: str) -> None:
    """Raise RewardError if the source defines no such name and has no star import."""
    names = _public_names(_parse_source(spec, source))
    if attribute not in names and "*" not in names:
        near = difflib.get_close_matches(attribute, names, n=1)
        cure = f"the nearest name is {near[0]!r}" if near else "name a class or function of that file"
        got = f"no {attribute!r} in {source}"
        raise RewardError(spec, got=got, expected=f"one of {', '.join(sorted(names)) or 'its names'}", cure=cure)


def _parse_source(spec: str, source: Path) -> ast.Module:
    """Parse a Python file. Raises RewardError for a syntax error."""
    try:
        return ast.parse(source.read_bytes())  # which may name its encoding
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        got = f"a syntax error in {source}{line} ({error.msg})"
        raise RewardError(spec, got=got, expected="a Python file", cure="correct that line") from error


def _public_names(tree: ast.AST) -> set[str]:
    """Return names bound outside of functions and classes, without imported modules."""
    names = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        else:
            names |= _public_names(node)
    return names


def _import_attribute(spec: str, base_dir=None):
    """Import the module or file before the colon and return the attribute named after it."""
    where, attribute = spec.rsplit(":", 1)
    is_file = where.endswith(".py")
    module = _import_file(_find_file(spec, where, base_dir)) if is_file else importlib.import_module(where)
    return getattr(module, attribute)


def _import_file(path: Path):
    """Import the file as a module, registered in sys.modules for dataclasses and pickling."""
    name = f"contentv_reward_{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def _construct(spec: str, target: type, kwargs: dict) -> Callable:
    """Instantiate the class; an exception becomes a RewardError with the line that raised it."""
    expected = f"{target.__name__}(...) to return a reward"
    cure = "correct the code, or the reward's entry in reward_kwargs"
    with keep_process_state(), name_reward_in_errors(spec, f"the arguments {kwargs}", expected, cure):
        signature = inspect.signature(target)
        kwargs = kwargs if "device" in signature.parameters else without_device(kwargs)
        try:
            signature.bind(**kwargs)
        except TypeError as error:
            _raise_bad_kwargs(spec, kwargs, signature, error)
        return target(**kwargs)


def _bind(spec: str, reward: Callable, kwargs: dict) -> Callable:
    """Return the callable with kwargs bound and its contract attributes kept."""
    if not callable(reward):
        cure = "name a class or a function"
        raise RewardError(spec, got=f"a {type(reward).__name__}", expected="a callable", cure=cure)
    if not kwargs:
        return reward
    signature = inspect.signature(reward)
    kwargs = kwargs if "device" in signature.parameters else without_device(kwargs)
    named = [p.name for p in signature.parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not set(kwargs) <= set(named[2:]):  # after video and prompts; **info is not for settings
        _raise_bad_kwargs(spec, kwargs, signature)
    return functools.update_wrapper(functools.partial(reward, **kwargs), reward)


def _raise_bad_kwargs(
    spec: str, kwargs: dict, signature: inspect.Signature, error: Exception | None = None
) -> NoReturn:
    """Raise RewardError for arguments that the reward does not take; suggest the nearest name."""
    wrong = [name for name in kwargs if name not in signature.parameters]
    near = difflib.get_close_matches(wrong[0], signature.parameters, n=1) if wrong else []
    cure = f"the nearest name is {near[0]!r}" if near else "correct the reward's entry in reward_kwargs"
    got = f"the arguments {kwargs}" + (f" ({error})" if error else "")
    raise RewardError(spec, got=got, expected=f"arguments for {signature}", cure=cure) from error
