"""Read values of settings as their annotated types, forgiving what YAML, shell and paths blur."""

import json
import math
import os
import types
import typing
from contextlib import suppress
from typing import Any, Literal

from rlhf.io import CONTENT_ERRORS, load_yaml

FLAG_VALUES = dict.fromkeys(("true", "yes", "on", "t", "y", "1"), True)
FLAG_VALUES |= dict.fromkeys(("false", "no", "off", "f", "n", "0"), False)


def coerce_all(values: dict, annotations: dict) -> tuple[dict, list[str]]:
    """Return values as their annotated types, and a problem for each one that cannot be cast."""
    right, problems = {}, []
    for name, value in _list_named_rewards(values).items():
        try:
            right[name] = coerce(value, annotations[name])
        except (TypeError, ValueError, OverflowError, RecursionError):
            got = repr(value) if len(repr(value)) <= 200 else f"{repr(value)[:200]}..."
            problems.append(f"{name}: got {got}, expected {type_name(annotations[name])}; correct its value")
    return right, problems


def coerce(value: Any, annotation: Any) -> Any:
    """Return `value` as the annotated type: also 1e-5 as text, "none", or one item for a list.

    Raises TypeError, ValueError or OverflowError where no reading makes sense.
    """
    kind, *others = _kinds(annotation)
    unset = value in ("none", ["none"])  # a list, of a flag
    if type(None) in others and (value is None or unset):
        return None
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Literal:
        return inner[[str(choice) for choice in inner].index(str(value))]
    if origin is list:
        value = [] if unset else value
        text = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(text, str) and text[:1] + text[-1:] == "[]":  # of a flag, as in YAML
            value = _parse_yaml(text)
        return [coerce(item, inner[0]) for item in (value if isinstance(value, list | tuple) else [value])]
    if origin is dict:
        value = _parse_yaml(value) if isinstance(value, str) else value
        items = _require_type(value, dict).items()
        return {_require_type(name, str): coerce(item, inner[1] if inner else Any) for name, item in items}
    if kind in (int, float):
        return _coerce_number(value, kind)
    if kind is bool and isinstance(value, str):  # of a flag
        value = FLAG_VALUES.get(value.lower(), value)
    if kind is Any:
        return require_no_nan(value)
    return _require_type(os.fspath(value) if isinstance(value, os.PathLike) else value, kind)


def _list_named_rewards(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings whose mappings {name: spec or {spec, arguments}} of rewards are lists.

    The arguments go to reward_kwargs. A mapping of another form stays for the check of its type.
    """
    values = dict(values)
    for setting_name in ("reward_funcs", "eval_reward_funcs"):
        if not isinstance(given := values.get(setting_name), dict):
            continue
        entries = {name: dict(entry) if isinstance(entry, dict) else {"spec": entry} for name, entry in given.items()}
        specs = {name: entry.pop("spec", None) for name, entry in entries.items()}
        if not all(isinstance(text, str) for pair in specs.items() for text in pair):
            continue
        values[setting_name] = [f"{name}={spec}" for name, spec in specs.items()]
        if arguments := {name: entry for name, entry in entries.items() if entry}:
            with suppress(TypeError, ValueError):  # as its own check says
                kwargs = coerce(values.get("reward_kwargs") or {}, dict[str, dict])
                values["reward_kwargs"] = kwargs | {name: kwargs.get(name, {}) | arguments[name] for name in arguments}
    return values


def _kinds(annotation) -> tuple:
    """Return the members of a union annotation, main type first; of others the type alone."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _coerce_number(value, kind):
    """Return the value as an int or float; raise if it is not finite or would change."""
    value = value.item() if hasattr(value, "item") else value  # numpy's, of a sweep
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(value)
    if kind is int and isinstance(value, int | str):  # a long seed is more exact than any float
        return int(value)
    if not math.isfinite(float(value)) or kind(value) != float(value):
        raise ValueError(value)
    return kind(value)


def require_no_nan(value: Any) -> Any:
    """Return the value; raise ValueError if it is NaN or holds it."""
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(value)
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        require_no_nan(item)
    return value


def _parse_yaml(text: str) -> Any:
    """Parse JSON, or YAML as typed in a shell, such as {nano_preference: 0.3}."""
    try:
        return json.loads(text)  # first, for YAML takes 1e-5 for text
    except (json.JSONDecodeError, RecursionError):
        pass
    try:
        return load_yaml(text)
    except CONTENT_ERRORS as error:
        raise ValueError(text) from error


def _require_type(value, kind):
    """Return the value; raise TypeError unless it is of this type."""
    if not isinstance(value, kind):
        raise TypeError(value)
    return value


def type_name(annotation: Any) -> str:
    """Return the type in a user's words."""
    kind, *others = _kinds(annotation)
    inner = typing.get_args(kind)
    match typing.get_origin(kind) or kind:
        case origin if origin is Literal:
            name = ("one of " if inner[1:] else "") + ", ".join(map(str, inner))
        case origin if origin is list:
            name = f"a list, each {type_name(inner[0])}"
        case origin if origin is dict:
            value = {dict: "{argument: value}", Any: "value"}.get(inner[1]) or type_name(inner[1]).removeprefix("a ")
            name = f"a mapping {{name: {value}}}"
        case _:
            name = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    return name + " or none" * (type(None) in others)
