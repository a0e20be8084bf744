"""The catalogue: every entry is complete and true to the class that it names; and its list."""

from importlib.metadata import EntryPoint
from inspect import signature

import pytest
import torch

from rewards import RewardError, built_in_names, load_reward, reward_attribute
from rewards.catalogue import CATALOGUE, WEIGHTS, Entry
from rewards.list import main
from rewards.load import import_built_in

OUTSIDE = [name for name, entry in CATALOGUE.items() if set(entry.weights) - {"this package"}]
HERE = [name for name in CATALOGUE if name not in OUTSIDE]


def without_weights(name):
    """The reward at full size; what needs weights from outside as an empty shell."""
    if name in HERE:
        return load_reward(name)
    with torch.device("meta"):
        return import_built_in(name).random_init()


@pytest.fixture(scope="module", params=sorted(CATALOGUE))
def named(request):
    return request.param, CATALOGUE[request.param], without_weights(request.param)


def test_an_entry_is_true_to_its_class(named):
    name, entry, reward = named
    assert reward.name == name
    parameters = sum(p.numel() for p in reward.parameters()) if isinstance(reward, torch.nn.Module) else 0
    assert entry.parameters == parameters
    assert entry.frames.startswith("first") == (reward_attribute(reward, "frames") == "first")
    assert ("no gradient" in entry.range) == (not reward_attribute(reward, "differentiable"))
    if parameters:
        assert max(reward.parameters(), key=torch.numel).element_size() == entry.bytes_each  # heads may be float32
        assert not any(p.requires_grad for p in reward.parameters())


def test_settings_are_those_that_the_guide_names():
    taken = {name: set(signature(import_built_in(name)).parameters) for name in CATALOGUE}
    without = lambda setting: {name for name, settings in taken.items() if setting not in settings}
    none = {"nano_preference", "nano_verifier", "latent_reward"}
    models = {name for name, entry in CATALOGUE.items() if entry.parameters} - none
    assert without("mean") == without("std") == none
    assert without("frames") == without("num_frames") == none | {"viclip", "video_align", "video_score", "vjepa2"}
    assert set(CATALOGUE) - without("chunk") == models
    assert set(CATALOGUE) - without("dtype") == models - {"motion_degree"}


def test_entries_are_complete():
    assert set(CATALOGUE) == set(built_in_names())
    for entry in CATALOGUE.values():
        assert entry.input.split(" + ")[0] in ("image", "video", "latents")
        assert entry.input.split(" + ")[1:] in ([], ["prompt"])
        assert bool(entry.weights) == bool(entry.parameters)
        assert set(entry.weights) <= set(WEIGHTS)


def test_weights_under_the_agpl_come_by_the_users_own_path():
    for entry in CATALOGUE.values():
        if "AGPL" in entry.licence:
            assert entry.own_path


def test_weights_of_an_own_path_are_asked_for(monkeypatch):
    monkeypatch.setitem(WEIGHTS, "someone/else", ("5 MB", "AGPL-3.0"))
    entry = Entry("rewards.models.pixels:Flicker", "video", "0 to 1", "all", ("someone/else",), 3, own_path="frames")
    monkeypatch.setitem(CATALOGUE, "guarded", entry)
    with pytest.raises(RewardError, match="got no `frames`; expected the path .* AGPL-3.0 .*never downloaded for you"):
        load_reward("guarded")
    with pytest.raises(RewardError, match="got no `frames`"):
        load_reward("guarded", frames=None)
    assert load_reward("guarded", frames=3).frames == 3
    assert entry.licence == "AGPL-3.0 (by your own path only)"


@pytest.mark.parametrize(
    ("parameters", "size", "memory"),
    [(0, 4, "-"), (5_257_536, 4, "21 MB"), (427_616_513, 4, "1.7 GB"), (10**9, 2, "2.0 GB")],
)
def test_memory_is_that_of_the_weights(parameters, size, memory):
    assert Entry("a:b", "video", "", parameters=parameters, bytes_each=size).memory == memory


def test_the_list_has_a_row_for_each(capsys):
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["name", "input", "frames", "range", "licence"]
    rows = {line.split()[0]: line for line in lines[2:] if line}
    assert list(rows)[: len(CATALOGUE)] == sorted(CATALOGUE)
    for part in ("image + prompt", "first", "MIT", "1.7 GB"):
        assert part in rows["clip_score"]
    assert "BSD-3-Clause" in rows["motion_degree"]


def test_rewards_of_other_packages_are_listed_and_hidden_ones_told(capsys, monkeypatch):
    names = ("shiny", "flicker")
    plugins = [EntryPoint(name, f"mine:{name.title()}", "contentv_rlhf.rewards") for name in names]
    monkeypatch.setattr("rewards.list.entry_points", lambda group: plugins)
    main()
    told = capsys.readouterr().out
    assert told.endswith(
        "flicker: mine:Flicker; hidden by the built-in of this name, use mine:Flicker\nshiny: mine:Shiny\n"
    )
