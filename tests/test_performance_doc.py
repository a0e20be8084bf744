"""docs/performance.md describes every setting about speed and names only what exists."""

import re
from pathlib import Path

from scripts import script

from rlhf.config import field_names

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def test_every_setting_about_speed_is_described():
    groups = script("docs/site_hooks.py").groups().items()
    of_speed = [names for title, names in groups if title.startswith(("Speed and memory", "Cheaper"))]
    assert len(of_speed) == 2
    for name in sum(of_speed, []):
        assert re.search(rf"^\|.*`{name}`.*\|", TEXT, re.MULTILINE), name


def test_settings_and_files_that_are_named_exist():
    named = {word for word in re.findall(r"`([a-z]+_[a-z_]+)(?:: [^`]*)?`", TEXT)}
    others = {"enable_gradient_checkpointing", "set_attention_backend", "no_grad"}
    assert named - others <= set(field_names()), named - others - set(field_names())
    for path in re.findall(r"`([a-z_0-9/]+\.(?:py|yaml))`", TEXT):
        assert (ROOT / path).exists() or (ROOT / "tests" / path).exists(), path
