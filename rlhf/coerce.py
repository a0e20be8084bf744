"""Values of settings as the types that they should have, forgiving what YAML, the shell and Python's paths blur."""

import json
import math
import os
import types
import typing
from typing import Any

import yaml


def coerced(values: dict, annotations: dict) -> tuple[dict, list[str]]:
    """Settings by name as the annotated types, and what is wrong with those that cannot be read so."""
    right, problems = {}, []
    for name, value in values.items():
        try:
            right[name] = coerce(value, annotations[name])
        except (TypeError, ValueError, OverflowError):
            problems.append(f"{name}: got {value!r}, expected {type_name(annotations[name])}; correct its value")
    return right, problems


def coerce(value: Any, annotation: Any) -> Any:
    """`value` as the annotated type, forgiving what YAML and the shell blur: 1e-5 as text, 'none', one item for a list.

    Raises TypeError, ValueError or OverflowError where no reading makes sense.
    """
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if type(None) in options and (value is None or value == "none"):
        return None
    kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is list:
        return [
            coerce(item, typing.get_args(kind)[0]) for item in (value if isinstance(value, list | tuple) else [value])
        ]
    if kind is dict:
        return _exactly(value, dict)
    if typing.get_origin(kind) is dict:
        return _coerce_dict(value, typing.get_args(kind)[1])
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is bool or kind is str:
        return _exactly(value, kind)
    return _coerce_number(value, kind)


def _coerce_number(value, kind):
    value = value.item() if hasattr(value, "item") else value  # numpy's, of a sweep
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(value)
    if kind is int and isinstance(value, int):  # also one that no float can tell from the next, such as a long seed
        return value
    if not math.isfinite(float(value)) or kind(value) != float(value):
        raise ValueError(value)
    return kind(value)


def _coerce_dict(value, kind) -> dict:
    value = _parsed(value) if isinstance(value, str) else value
    return {_exactly(name, str): coerce(item, kind) for name, item in _exactly(value, dict).items()}


def _parsed(text: str):
    """JSON, or what a shell user writes for it in YAML: {nano_preference: 0.3}."""
    try:
        return json.loads(text)  # first, for YAML takes 1e-5 for text
    except json.JSONDecodeError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(text) from error


def _exactly(value, kind):
    if not isinstance(value, kind):
        raise TypeError(value)
    return value


def type_name(annotation: Any) -> str:
    """The type in a user's words."""
    if isinstance(annotation, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        if typing.get_origin(kinds[0]) is dict:
            kinds = kinds[:1]  # the text of a flag is a mapping, too
        return " or ".join([type_name(kind) for kind in kinds] + ["none"] * (type(None) in typing.get_args(annotation)))
    if typing.get_origin(annotation) is list:
        return f"a list, each {type_name(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is dict:
        inner = typing.get_args(annotation)[1]
        return f"a mapping {{name: {'{argument: value}' if inner is dict else type_name(inner).removeprefix('a ')}}}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation]
