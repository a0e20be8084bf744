"""Values of settings as the types that they should have, forgiving what YAML and the shell blur."""

import json
import types
import typing
from typing import Any


def coerce(value: Any, annotation: Any) -> Any:
    """`value` as the annotated type, forgiving what YAML and the shell blur: 1e-5 as text, 'none', one item for a list.

    Raises TypeError or ValueError where no reading makes sense.
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
    if kind is bool or kind is str:
        return _exactly(value, kind)
    return _coerce_number(value, kind)


def _coerce_number(value, kind):
    if isinstance(value, bool) or not isinstance(value, int | float | str) or kind(value) != float(value):
        raise TypeError(value)
    return kind(value)


def _coerce_dict(value, kind) -> dict:
    value = json.loads(value) if isinstance(value, str) else value
    return {_exactly(name, str): coerce(item, kind) for name, item in _exactly(value, dict).items()}


def _exactly(value, kind):
    if not isinstance(value, kind):
        raise TypeError(value)
    return value


def type_name(annotation: Any) -> str:
    """An annotation in words, for messages."""
    name = str(annotation) if typing.get_args(annotation) else annotation.__name__
    names = {" | None": " or none", "dict[str, dict]": "a mapping {name: {argument: value}}"}
    names |= {"dict[str, int]": "a mapping {name: whole number}", "dict[str, float]": "a mapping {name: number}"}
    names |= {" | str or": " or"}
    for python, plain in names.items():
        name = name.replace(python, plain)
    return name
