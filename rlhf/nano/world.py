"""The world of nano: captioned clips of one or two moving shapes.

A scene has six attributes and a position; its caption names the attributes in one of several
wordings. Every sixth combination of colour, shape and motion is held out: no training clip and no
training prompt has it. The same seed gives the same scenes and prompts on every machine.

Shapes as in `rlhf.types`; a scene batch is a dict of (B,) tensors (see `sample_scenes`).
"""

import math
import re
from collections.abc import Callable

import torch

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = {
    "red": (0.90, 0.08, 0.08),
    "green": (0.10, 0.70, 0.20),
    "blue": (0.12, 0.22, 0.95),
    "yellow": (0.95, 0.90, 0.10),
    "purple": (0.55, 0.10, 0.80),
    "orange": (1.00, 0.50, 0.05),
    "cyan": (0.10, 0.85, 0.90),
    "pink": (1.00, 0.50, 0.75),
}
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
SIZES = {"small": 0.26, "large": 0.42}  # radius in units of half the shorter side
GROUNDS = {
    "black": (0.03, 0.03, 0.03),
    "white": (0.97, 0.97, 0.97),
    "gray": (0.5, 0.5, 0.5),
    "navy": (0.05, 0.08, 0.25),
}
MOTIONS = ("left", "right", "up", "down", "still", "growing")
MOTION_PHRASES = {
    "left": ("moving left", "drifting to the left"),
    "right": ("moving right", "drifting to the right"),
    "up": ("moving up", "rising up"),
    "down": ("moving down", "falling down"),
    "still": ("standing still", "not moving"),
    "growing": ("growing", "getting bigger"),
}
COUNTS = ("one", "two")
SENTENCES = (
    "{a} {size} {color} {shape} {motion} on a {ground} background",
    "{ground} background with {a} {size} {color} {shape} {motion}",
    "{a} {color} {shape} {motion}",
    "on {ground}, {one} {size} {shape} in {color}, {motion}",
    "a video of {a} {color} {shape} {motion} on {ground}",
)
JUDGED = ("color", "shape", "motion", "count")  # attributes that the verifier classifies
VALUES = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "count": COUNTS,
    "size": tuple(SIZES),
    "ground": tuple(GROUNDS),
}
NUM_VALUES = {attribute: len(values) for attribute, values in VALUES.items()}
TRAVEL = 0.9  # path of a moving shape, in units of half the shorter side

Scenes = dict[str, torch.Tensor]


def is_held_out(scenes: Scenes) -> torch.Tensor:
    """Return whether each combination of colour, shape and motion is held out, (B,) bool."""
    return (scenes["color"] * 7 + scenes["shape"] * 3 + scenes["motion"]) % 6 == 0


def sample_scenes(count: int, generator: torch.Generator, held_out: bool | None = False) -> Scenes:
    """Draw B = count scenes on the generator's device.

    held_out: False for training combinations, True for held-out ones, None for both.
    Returns indices (B,) int64 of `VALUES`, and centres x, y (B,) float32 in [-0.25, 0.25].
    """
    device, surplus = generator.device, count if held_out is None else 12 * count + 64
    draw = {k: torch.randint(n, (surplus,), generator=generator, device=device) for k, n in NUM_VALUES.items()}
    draw |= {k: torch.rand(surplus, generator=generator, device=device) * 0.5 - 0.25 for k in ("x", "y")}
    keep = torch.arange(surplus, device=device)
    if held_out is not None:
        keep = (is_held_out(draw) == held_out).nonzero()[:, 0]
    assert len(keep) >= count, "twelvefold surplus did not hold enough combinations"
    return {k: v[keep[:count]] for k, v in draw.items()}


def covered(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor, shape: torch.Tensor, edge: float) -> torch.Tensor:
    """Return how far each pixel is inside the shape of radius r at the origin, in [0, 1].

    x, y: (B, T, H, W), r: (B, 1 or T, 1, 1), in units of half the shorter side; shape: (B,).
    edge: steepness of the antialiased outline.
    """
    return torch.sigmoid(-distance(x, y, r, shape) * edge)


def render(
    scenes: Scenes, height: int = 64, width: int = 64, num_frames: int = 17, coverage: Callable = covered
) -> torch.Tensor:
    """Draw scenes as video_BCTHW, float32 in [0, 1], antialiased.

    coverage: returns each pixel's opacity in [0, 1], as `covered` does; another one deforms.
    """
    device = scenes["color"].device
    column = lambda v: v.view(-1, 1, 1, 1)  # (B, T, H, W)
    time = torch.linspace(0, 1, num_frames, device=device).view(1, -1, 1, 1)
    unit = min(height, width) / 2
    x = ((torch.arange(width, device=device) + 0.5 - width / 2) / unit).view(1, 1, 1, -1)
    y = ((torch.arange(height, device=device) + 0.5 - height / 2) / unit).view(1, 1, -1, 1)

    motion, pair = scenes["motion"], scenes["count"] == 1
    step_x = torch.tensor([-1.0, 1, 0, 0, 0, 0], device=device)[motion]
    step_y = torch.tensor([0.0, 0, -1, 1, 0, 0], device=device)[motion]
    center_x = column(scenes["x"]) + column(step_x) * (time - 0.5) * TRAVEL
    center_y = column(scenes["y"]) + column(step_y) * (time - 0.5) * TRAVEL
    sizes = torch.tensor(list(SIZES.values()), device=device)[scenes["size"]]
    radius = column(sizes * torch.where(pair, 0.8, 1.0)) * torch.where(column(motion == 5), 0.5 + 0.9 * time, 1.0)
    # The two of a pair are apart at right angles to their motion, so that both stay in view.
    apart_x = column(torch.where(step_y != 0, 0.5, 0.0) + torch.where(motion >= 4, 0.5, 0.0)) * column(pair)
    apart_y = column(torch.where(step_x != 0, 0.5, 0.0)) * column(pair)

    alpha_at = lambda u, v: coverage(u, v, radius, scenes["shape"], unit * 1.5)
    alpha = alpha_at(x - center_x - apart_x, y - center_y - apart_y)
    if bool(pair.any()):
        alpha = torch.maximum(alpha, alpha_at(x - center_x + apart_x, y - center_y + apart_y))
    alpha = alpha.unsqueeze(1)
    rgb = lambda colors, index: torch.tensor(list(colors.values()), device=device)[index].view(-1, 3, 1, 1, 1)
    return torch.lerp(rgb(GROUNDS, scenes["ground"]), rgb(COLORS, scenes["color"]), alpha)


def distance(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """Return signed distances (B, T, H, W) to shapes of radius r at the origin; negative inside."""
    rho = (x * x + y * y).sqrt()
    fifth = math.pi / 5
    spike = ((torch.atan2(x, -y) + fifth).remainder(2 * fifth) - fifth).abs() / fifth
    bar = lambda u, v: torch.maximum(u.abs() - r * 0.95, v.abs() - r * 0.3)
    by_shape = (
        lambda: rho - r,
        lambda: torch.maximum(x.abs(), y.abs()) - r * 0.85,
        lambda: torch.maximum(0.866 * x.abs() - 0.5 * y, y) - r * 0.55,
        lambda: rho - r * (1.05 - 0.6 * spike),
        lambda: (rho - r * 0.72).abs() - r * 0.25,
        lambda: torch.minimum(bar(x, y), bar(y, x)),
    )
    found = by_shape[0]()
    for index in range(1, len(SHAPES)):
        found = torch.where((shape == index).view(-1, 1, 1, 1), by_shape[index](), found)
    return found


def caption(scene: dict[str, int], sentence: int = 0, phrase: int = 0) -> str:
    """Return the caption of one scene, given by its attributes' indices.

    sentence: index of the template. phrase: index of the motion's wording; an odd one also
    begins with a capital letter. Both wrap around.
    """
    value = {attribute: VALUES[attribute][scene[attribute]] for attribute in VALUES}
    is_pair = scene["count"] == 1
    words = value | {
        "a": "two" if is_pair else "a",
        "one": value["count"],
        "shape": PLURALS[value["shape"]] if is_pair else value["shape"],
        "motion": MOTION_PHRASES[value["motion"]][phrase % 2],
    }
    text = SENTENCES[sentence % len(SENTENCES)].format(**words).replace("a orange", "an orange")
    return text[0].upper() + text[1:] if phrase % 2 else text


def captions(scenes: Scenes, generator: torch.Generator | None = None) -> list[str]:
    """Return a caption for each scene: in random wording with a CPU generator, else the first."""
    rows = {k: scenes[k].tolist() for k in NUM_VALUES}
    count = len(rows["color"])
    wording = torch.zeros(count, 2, dtype=torch.long)
    if generator is not None:
        wording = torch.randint(2 * len(SENTENCES), (count, 2), generator=generator)
    return [caption({k: v[i] for k, v in rows.items()}, *wording[i].tolist()) for i in range(count)]


def read_caption(text: str) -> dict[str, int]:
    """Return the indices of the judged attributes that a caption names.

    Raises ValueError if it does not name a colour, a shape and a motion of this world.
    """
    words = re.findall(r"[a-z]+", text.lower())
    singular = {s: s for s in SHAPES} | {plural: s for s, plural in PLURALS.items()}
    motion = {m: m for m in MOTIONS} | {"bigger": "growing", "not": "still"}
    found = {
        "color": [VALUES["color"].index(w) for w in words if w in COLORS],
        "shape": [SHAPES.index(singular[w]) for w in words if w in singular],
        "motion": [MOTIONS.index(motion[w]) for w in words if w in motion],
    }
    missing = [k for k, v in found.items() if not v]
    if missing:
        raise ValueError(
            f"got the prompt {text!r}, which names no {' and no '.join(missing)} of this world; expected a "
            "sentence such as 'a small red circle moving left'; use prompts of rlhf.nano.world, or leave "
            "out the verifier."
        )
    return {k: v[0] for k, v in found.items()} | {"count": int("two" in words)}


def train_prompts(count: int, seed: int = 0) -> list[str]:
    """Return prompts of training combinations, in random wording."""
    return _prompts(count, seed, held_out=False)


def held_out_prompts(count: int, seed: int = 0) -> list[str]:
    """Return prompts of held-out combinations, in random wording."""
    return _prompts(count, seed + 10_000, held_out=True)


def _prompts(count: int, seed: int, held_out: bool) -> list[str]:
    """Return captions of random scenes; held_out as in `sample_scenes`."""
    generator = torch.Generator().manual_seed(seed)
    return captions(sample_scenes(count, generator, held_out=held_out), generator)
