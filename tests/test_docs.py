"""The guides name settings, files and flags that exist."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml

from rlhf.config import field_names
from rlhf.export import parse as parse_export
from rlhf.tracking import read_metrics

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("migrate_*.md"))
GUIDES = [*PAGES, *(ROOT / "docs" / f"{name}.md" for name in ("watching", "export", "evaluation"))]


@pytest.mark.skipif("method" not in field_names(), reason="the methods are not settings here")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_of_a_migration_page_exist(page):
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        assert set(yaml.safe_load(block)) <= set(field_names())
    rows = [re.split(r"(?<!\\)\|", row) for row in page.read_text().splitlines() if row.startswith("|")]
    ours = [row[2] for row in rows]
    named = {name for cell in ours for name in re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)(?::[^`]*)?`", cell)}
    assert named <= {*field_names(), "train_dataset", "hps_v2"}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_links_lead_somewhere(guide):
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", guide.read_text()):
        assert (guide.parent / link).exists(), link


@pytest.mark.parametrize("line", re.findall(r"^(?:python|accelerate launch) (eval/.*)$", GUIDES[-1].read_text(), re.M))
def test_commands_of_the_guide_are_understood(line, tmp_path, monkeypatch):
    script, *arguments = shlex.split(line)
    (tmp_path / "runs" / "nano").mkdir(parents=True)
    (tmp_path / "runs" / "nano" / "config.yaml").write_text("model: nano\n")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / script))["parse"](arguments)  # argparse would end the test


@pytest.mark.parametrize(
    "line", re.findall(r"^python -m rlhf.export (.*)$", (ROOT / "docs/export.md").read_text(), re.M)
)
def test_exports_of_the_guide_are_understood(line):
    assert parse_export(shlex.split(line)).run == Path("runs/nano")


def test_the_callback_of_the_guide_runs(tmp_path, monkeypatch):
    """On one step less of everything: the guide's own block, with nano's smallest sizes."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "watching.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    small = "num_frames=5, height=32, width=32, num_inference_steps=2, num_sample_prompts=0, num_diversity_prompts=0"
    names = {}
    exec(block.replace("num_eval_prompts=2", f"num_eval_prompts=2, report_to='none', cpu_threads=1, {small}"), names)
    rows = read_metrics(Path("runs/patient"))
    assert 0 < len(rows) <= 2
    assert all("eval/motion" in row for row in rows)
