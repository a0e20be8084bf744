"""What docs/api.md promises to other code: it exists, and says what it takes, gives and raises."""

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import rewards

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
LISTED = re.findall(r"^::: (\S+)(?:\n    options: \{members: \[(.*)\]\})?", PAGE, re.MULTILINE)


def find(name: str):
    """The module, class or function of a dotted name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        home, _, attribute = name.rpartition(".")
        return getattr(find(home), attribute)


def own_members(thing, shown: str) -> dict:
    """Public functions, classes and properties that a module or class defines itself, or those that
    are shown.
    """
    names = shown.split(", ") if shown else [name for name in vars(thing) if not name.startswith("_")]
    found = {name: inspect.getattr_static(thing, name) for name in names}
    here = thing.__name__ if isinstance(thing, ModuleType) else thing.__module__
    kinds = (type, property, classmethod, staticmethod)
    return {
        name: member
        for name, member in found.items()
        if isinstance(member, kinds) or inspect.isfunction(member) and member.__module__ == here
        if not isinstance(member, type) or member.__module__ == here
    }


def promised() -> list:
    """Every listed thing and its members, as parameters (dotted name, object)."""
    things = {}
    for name, shown in LISTED:
        thing = things[name] = find(name)
        if isinstance(thing, ModuleType | type):
            for inner, member in own_members(thing, shown).items():
                things[f"{name}.{inner}"] = member
                if isinstance(member, type):
                    things |= {f"{name}.{inner}.{one}": m for one, m in own_members(member, "").items()}
    return [pytest.param(name, thing, id=name) for name, thing in things.items()]


@pytest.mark.parametrize(("name", "thing"), promised())
def test_what_is_promised_has_a_docstring_and_types(name, thing):
    told = inspect.getdoc(thing)
    assert told, f"{name} has no docstring"
    assert len(told.split()) >= 3
    assert not told.startswith(f"{name.rpartition('.')[2]}("), "made by dataclass, not written"
    function = thing.__func__ if isinstance(thing, classmethod | staticmethod) else thing
    if inspect.isfunction(function):
        untyped = [
            parameter.name
            for parameter in inspect.signature(function).parameters.values()
            if parameter.annotation is parameter.empty and parameter.name not in ("self", "cls", "info", "kwargs", "_")
        ]
        assert not untyped, f"{name}: {untyped} have no type"


def test_all_that_rewards_exports_is_listed():
    listed = {name.rpartition(".")[2] for name, _ in LISTED}
    assert set(rewards.__all__) <= listed


def test_nothing_is_listed_twice():
    names = [name for name, _ in LISTED]
    assert len(names) == len(set(names)) > 30
