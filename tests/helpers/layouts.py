"""Published layouts, tests/data/layouts/*.json: {"source": where from, "keys": {name: shape}}.

A name with {0..27} in it stands for 28 names.
"""

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "data" / "layouts"


def published_layout(name):
    """Shapes by key."""
    layout = json.loads((FOLDER / f"{name}.json").read_text())
    assert layout["source"]
    return {key: tuple(shape) for pattern, shape in layout["keys"].items() for key in _expanded(pattern)}


def _expanded(pattern):
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    return [pattern.replace(found[0], str(i)) for i in range(int(found[1]), int(found[2]) + 1)]


def layout_of(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}
