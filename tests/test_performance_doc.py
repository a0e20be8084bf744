"""docs/performance.md describes every setting about speed and names only what exists."""

import dataclasses
import re
from pathlib import Path

from rlhf.config import field_names
from rlhf.speed import Speed
from rlhf.speed_checks import AT_LEAST_ONE, CHOICES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def test_every_setting_about_speed_is_described():
    settings = {field.name for field in dataclasses.fields(Speed)} | {*CHOICES, *AT_LEAST_ONE}
    settings |= {"stepwise_backward", "guidance_together"}
    for name in settings:
        assert re.search(rf"^\|.*`{name}`.*\|", TEXT, re.MULTILINE), name


def test_settings_and_files_that_are_named_exist():
    named = {word for word in re.findall(r"`([a-z]+_[a-z_]+)(?:: [^`]*)?`", TEXT)}
    others = {"enable_gradient_checkpointing", "set_attention_backend", "no_grad"}
    assert named - others <= set(field_names()), named - others - set(field_names())
    for path in re.findall(r"`([a-z_0-9/]+\.(?:py|yaml))`", TEXT):
        assert (ROOT / path).exists() or (ROOT / "tests" / path).exists(), path
