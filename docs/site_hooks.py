"""What mkdocs puts into pages while it builds the site: the table of all settings, as the code has them today."""

import dataclasses
import sys
from pathlib import Path

MARK = "<!-- settings -->"


def settings_table() -> str:
    """A row for each setting: name, default and help."""
    sys.path.insert(0, str(Path(__file__).parents[1]))  # mkdocs takes back what a hook does at its start
    from rlhf.config import RewardGradientConfig

    lines = ["| setting | default | what it is |", "|---|---|---|"]
    for field in dataclasses.fields(RewardGradientConfig):
        default = getattr(RewardGradientConfig(), field.name)
        told = field.metadata["help"].replace("|", r"\|")
        lines.append(f"| `{field.name}` | `{'none' if default is None else default}` | {told} |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_) -> str:
    """mkdocs calls this for each page, before it is rendered."""
    return markdown.replace(MARK, settings_table()) if MARK in markdown else markdown
