"""docs/methods.md names every method and only settings that exist; its tables are filled from results."""

import json
import re
from pathlib import Path

import pytest
import yaml
from scripts import script

from rlhf.config import GUIDANCE_GRADIENTS, METHODS, RewardGradientConfig, field_names

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables():
    return script("bench/tables.py")


def test_every_method_and_mode_has_its_row():
    for name in (*METHODS, *GUIDANCE_GRADIENTS):
        assert re.search(rf"^\| `{name}`", TEXT, re.MULTILINE), name


def test_settings_that_are_shown_exist():
    for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL):
        RewardGradientConfig(**yaml.safe_load(block))
    named = {word for word in re.findall(r"`([a-z_]+)(?:: [^`]*)?`", TEXT) if "_" in word}
    known = {*field_names(), *METHODS, "best_adapter", "v_neg", "s_m"}
    assert named <= known, named - known


def row(arm: str, seed: int, value: float) -> dict:
    judged = {"base": 1.0, "tuned": 1 + value, "diff": value}
    spent = {"steps": 80, "device_seconds": 40.0, "hacking_gap": value}
    return {"arm": arm, "seed": seed} | dict.fromkeys(("trained", "verifier", "clip", "motion"), judged) | spent


def test_tables_are_filled_and_filled_again(tables, tmp_path):
    about = {"device": "a chip", "cores": 2, "torch": "2.15", "arms": ["draft_k, K = 4"]}
    results = [
        {"environment": about, "rows": [row("draft_k, K = 4", s, v) for s, v in enumerate(values)]}
        for values in ((0.1, 0.3), (0.5,))
    ]
    text, path = TEXT, tmp_path / "bench" / "results" / "methods.json"
    path.parent.mkdir(parents=True)
    for result in results:
        path.write_text(json.dumps(result))
        text = tables.fill_cells(tables.fill(text, tmp_path), result)
    assert "<!-- nano: draft_k, K = 4 -->+0.500, +50.0<!-- / -->" in text
    assert text.count("Measured on a chip (2 cores), torch 2.15.") == 1
    assert "| `draft_k, K = 4` | 1 | +0.500 | +50.0 | +0.500 | +0.500 | +50.0 | 0.500 |" in text
    assert "+0.200 (+0.100 to +0.300)" in tables.methods_table(results[0])


def test_every_cell_is_an_arm_of_the_benchmark():
    arms = (ROOT / "bench" / "methods.py").read_text(encoding="utf-8")
    cells = re.findall(r"<!-- nano: (.*?) -->", TEXT)
    assert len(cells) >= len(METHODS)
    assert all(f'"{arm}":' in arms for arm in cells)
