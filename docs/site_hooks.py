"""The tables of all settings, grouped as in the code. mkdocs puts them into docs/settings.md."""

import dataclasses
import inspect
import re
import sys
import typing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # mkdocs takes back what a hook does at its start
from rlhf.config import RewardGradientConfig, range_text
from rlhf.config.coerce import type_name
from rlhf.method.options import METHOD_OPTIONS

SETTINGS, OPTIONS = "<!-- settings -->", "<!-- options -->"
HEAD = "| setting | value | default | what it does |\n|---|---|---|---|"


def groups() -> dict[str, list[str]]:
    """Return the names of settings by the comment that heads them in the dataclass."""
    found: dict[str, list[str]] = {}
    for title, name in re.findall(r"^    (?:# (.*)|(\w+): .*setting\()", inspect.getsource(RewardGradientConfig), re.M):
        if title:
            found[title] = names = []
        else:
            names.append(name)
    return found


def row(kind: type, name: str) -> str:
    """Return the row of a field: its name, type and range, default and help."""
    field = kind.__dataclass_fields__[name]
    value = ", ".join(filter(None, [type_name(typing.get_type_hints(kind)[name]), range_text(field)]))
    default = getattr(kind(), name)
    cells = [f"`{name}`", value, f"`{'none' if default is None else default}`", field.metadata["help"]]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def settings_tables() -> str:
    """Return a heading and a table for each group of settings."""
    tables = []
    for title, names in groups().items():
        head, _, note = title.rstrip(".").partition(". ")
        rows = [row(RewardGradientConfig, name) for name in names]
        tables.append("\n".join([f"## {head}", *([f"\n{note}.\n"] if note else [""]), HEAD, *rows]))
    return "\n\n".join(tables)


def options_table() -> str:
    """Return a row for each option of each method; those of every method come first."""
    common, *_ = METHOD_OPTIONS.values()
    rows = [row(common, field.name) for field in dataclasses.fields(common)]
    for method, kind in METHOD_OPTIONS.items():
        own = [field.name for field in dataclasses.fields(kind) if field.name not in common.__dataclass_fields__]
        rows += [row(kind, name).replace("| `", f"| {method}: `", 1) for name in own]
    return "\n".join([HEAD.replace("setting", "method: option"), *rows])


def on_page_markdown(markdown: str, **_) -> str:
    """Fill the tables into a page; mkdocs calls this for each, before it is rendered."""
    for mark, make in ((SETTINGS, settings_tables), (OPTIONS, options_table)):
        markdown = markdown.replace(mark, make()) if mark in markdown else markdown
    return markdown
