"""Imports point one way: rooms know those before them, and the picture in the guide is the one of today."""

import ast
import graphlib

import pytest
from import_graph import EXCEPTIONS, PAGE, ROOMS, drawn, imported_by, imports, modules, room_of

ORDER = list(ROOMS)


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_its_own_room_and_those_before_it(module):
    assert room_of(module), f"{module} has no room; add it to ROOMS in tests/import_graph.py"
    for name in imports()[module]:
        against = ORDER.index(room_of(name)) > ORDER.index(room_of(module))
        assert against == ((module, name) in EXCEPTIONS), f"{module} imports {name}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: {n for n in names if (name, n) not in EXCEPTIONS} for name, names in imports().items()}
    order = [*graphlib.TopologicalSorter(graph).static_order()]  # raises CycleError with the way
    assert {*graph} <= {*order}


@pytest.mark.parametrize(
    ("who", "whom"),
    [
        ("rewards", ("rlhf.contentv", "rlhf.sampler", "rlhf.config", "rlhf.trainer", "rlhf.lora")),
        ("rlhf.contentv", ("rewards", "rlhf.config", "rlhf.sampler", "rlhf.lora", "rlhf.trainer")),
        ("rlhf.sampler", ("rewards", "rlhf.config", "rlhf.trainer")),
        ("rlhf.report", ("rlhf.trainer",)),
    ],
)
def test_what_a_room_must_not_know_it_does_not_know_through_others_either(who, whom):
    known, new = set(), {name for name in modules() if name == who or name.startswith(f"{who}.")}
    while new:
        known |= new
        new = {n for name in new for n in imports()[name] if (name, n) not in EXCEPTIONS} - known
    assert not [name for name in known for bad in whom if name == bad or name.startswith(f"{bad}.")]


def test_imports_are_read_from_anywhere_in_a_module():
    tree = ast.parse(
        "import rlhf.lora\ndef f():\n    from rlhf import device, torch\n    from rewards.mix import RewardMix"
    )
    assert imported_by(tree) == {"rlhf.lora", "rlhf.device", "rewards.mix"}


def test_every_exception_and_pattern_is_needed():
    assert all(name in imports()[module] for module, name in EXCEPTIONS)
    for room, (_, patterns) in ROOMS.items():
        for pattern in patterns.split():
            assert any(room_of(name) == room for name in modules() if name == pattern or "*" in pattern), pattern


def test_the_picture_in_the_guide_is_of_today():
    text = PAGE.read_text(encoding="utf-8")
    assert "flowchart" in text
    assert drawn(text) == text, "run `python tests/import_graph.py`"
