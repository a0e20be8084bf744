"""Published layouts of weights, tests/data/layouts/*.json: {"source": where from, "keys": {name: shape}}."""

import json
from pathlib import Path

FOLDER = Path(__file__).with_name("data") / "layouts"


def published_layout(name):
    """Shapes by key."""
    layout = json.loads((FOLDER / f"{name}.json").read_text())
    assert layout["source"]
    return {key: tuple(shape) for key, shape in layout["keys"].items()}


def layout_of(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}
