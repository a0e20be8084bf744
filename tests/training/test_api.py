"""What docs/api.md promises to other code: it exists, and says what it takes, gives and raises."""

import inspect
import pydoc
import re
from pathlib import Path

import pytest

import rewards

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
LISTED = re.findall(r"^::: (\S+)(?:\n    options: \{members: \[(.*)\]\})?", PAGE, re.MULTILINE)
UNTYPED = ("self", "cls", "info", "kwargs", "_")


def own_members(thing, shown: str) -> list:
    """The public functions and classes that a module or class defines itself, or those shown."""
    names = shown.split(", ") if shown else [name for name in vars(thing) if not name.startswith("_")]
    home = thing.__name__ if inspect.ismodule(thing) else thing.__module__
    members = [getattr(thing, name) for name in names]
    return [m for m in members if inspect.isroutine(m) or inspect.isclass(m) if m.__module__ == home]


@pytest.mark.parametrize(("name", "shown"), LISTED)
def test_what_is_promised_has_a_docstring_and_types(name, shown):
    thing = pydoc.locate(name)
    things = [thing, *(own_members(thing, shown) if inspect.ismodule(thing) or inspect.isclass(thing) else [])]
    things += [inner for one in things[1:] if inspect.isclass(one) for inner in own_members(one, "")]
    for one in things:
        told = inspect.getdoc(one)
        assert told, f"{one} has no docstring"
        assert len(told.split()) >= 3
        assert not told.startswith(f"{one.__name__}("), "made by dataclass, not written"
        if inspect.isfunction(one):
            parameters = [p for p in inspect.signature(one).parameters.values() if p.name not in UNTYPED]
            assert not [p.name for p in parameters if p.annotation is p.empty], f"{one} lacks types"


def test_all_that_rewards_exports_is_listed_and_nothing_twice():
    names = [name for name, _ in LISTED]
    assert len(names) == len(set(names)) > 30
    assert set(rewards.__all__) <= {name.rpartition(".")[2] for name in names}
