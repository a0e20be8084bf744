"""`python -m rewards.check`, the example reward, and what docs/rewards.md names."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rewards import check_spec, load_reward, probe, reward_name
from rewards.check import main
from rlhf.config import RewardGradientConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "rewards.md"
EXAMPLE = ROOT / "docs" / "examples" / "colourfulness.py"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_reward_that_passes(capsys):
    assert main(["flicker", "--shape", "3,5,16,16"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("  pass  ") == 6
    assert "keeps the contract" in printed


@pytest.mark.parametrize("given", ['{"gain": 3}', "{gain: 3}"])
def test_arguments_and_prompts_reach_the_reward(given, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "class Mine:\n"
        "    def __init__(self, gain):\n"
        "        self.gain = gain\n"
        "    def __call__(self, video, prompts, **info):\n"
        "        print('prompts', prompts, 'gain', self.gain)\n"
        "        return video.mean(dim=(1, 2, 3, 4))\n"
    )
    assert main([f"{tmp_path}/mine.py:Mine", "--kwargs", given, "--prompt", "one", "--prompt", "two"]) == 0
    assert "prompts ['one', 'two'] gain 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "part"),
    [(["flickr"], "nearest name is 'flicker'"), (["flicker", "--shape", "3,1,8,8"], "expected at least 2")],
)
def test_a_reward_that_fails(argv, part, capsys):
    assert main(argv) == 1
    printed = capsys.readouterr().out
    assert "  FAIL  " in printed
    assert part in printed
    assert "keeps the contract" not in printed


@pytest.mark.parametrize(
    "argv", [["--shape", "3,17"], ["--shape", "3,0,8,8"], ["--kwargs", "{gain: 3"], ["--kwargs", "[3]"]]
)
def test_arguments_that_can_not_be_read(argv, capsys):
    with pytest.raises(SystemExit):
        main(["flicker", *argv])
    assert "expected" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:'rewards.check' found in sys.modules")
def test_it_runs_as_a_module(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check", "no_such_reward"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("rewards.check", run_name="__main__")
    assert ended.value.code == 1


# ---------------------------------------------------------------- the example


def test_the_example_keeps_the_contract():
    report = probe(load_reward("examples/colourfulness.py:Colourfulness", base_dir=ROOT / "docs"))
    assert report.frames == 17


def test_the_example_is_short():
    code = EXAMPLE.read_text().split("\n\n\n", 1)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_the_example_prefers_colour_to_grey():
    reward = load_reward(f"{EXAMPLE}:Colourfulness")
    vivid = torch.rand(1, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    grey = vivid.mean(dim=1, keepdim=True).expand_as(vivid)
    scores = reward(torch.cat([grey, (vivid + grey) / 2, vivid]), ["a"] * 3)
    assert scores[0] < 0.01
    assert scores.diff().min() > 0.05


# ---------------------------------------------------------------- the guide


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), re.DOTALL)


def test_the_config_in_the_guide_names_rewards_that_exist():
    for block in blocks("yaml"):
        config = RewardGradientConfig(**yaml.safe_load(block))
        for spec in config.reward_funcs + config.eval_reward_funcs:
            check_spec(spec, ROOT / "configs")
        assert len(config.reward_weights) == len(config.reward_funcs)
        assert set(config.reward_kwargs or {}) <= set(map(reward_name, config.reward_funcs))


def test_the_guide_lists_every_built_in():
    from rewards import built_in_names

    for name in built_in_names():
        assert f"`{name}`" in DOCS.read_text()
