"""Published layouts of weights, tests/data/layouts/*.json: {"source": where from, "keys": {name: shape}}.

`{0..31}` in a name stands for that run of numbers.
"""

import json
import re
from pathlib import Path

FOLDER = Path(__file__).with_name("data") / "layouts"


def published_layout(name):
    """Shapes by key."""
    layout = json.loads((FOLDER / f"{name}.json").read_text())
    assert layout["source"]
    shapes = {}
    for key, shape in layout["keys"].items():
        run = re.search(r"\{(\d+)\.\.(\d+)\}", key)
        for number in range(int(run[1]), int(run[2]) + 1) if run else [None]:
            shapes[key if run is None else key.replace(run[0], str(number))] = tuple(shape)
    return shapes


def layout_of(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}
