"""The README's own code runs."""

import json
import re
from pathlib import Path

import pytest

from rewards import check

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)
    assert found
    return found


def test_the_reward_of_the_readme_keeps_the_contract(tmp_path, capsys):
    reward = next(block for block in blocks("python") if "class Warm" in block)
    (tmp_path / "my_reward.py").write_text(reward)
    assert check.main([f"{tmp_path / 'my_reward.py'}:Warm"]) == 0
    assert "gradient" in capsys.readouterr().out


def test_the_trainer_of_the_readme_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = next(block for block in blocks("python") if "RewardGradientTrainer(" in block)
    exec(compile(code, str(README), "exec"), {})
    summary = json.loads((tmp_path / "runs" / "python" / "summary.json").read_text())
    assert summary["steps"] == 2


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()))))
def test_links_lead_somewhere(link):
    assert (README.parent / link).exists()
