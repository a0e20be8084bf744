"""Deformations of nano clips, graded from 0 (whole) to 1, for the training and the test of judges.

Every kind is scaled by eye, for each shape: at `VISIBLE` a person who sees the clip at 64x64 no
longer calls the shape (or the colour) by its name. The kinds in `HELD_OUT` are for tests only.
"""

import math
from collections.abc import Callable

import torch

from rlhf.nano import world

VISIBLE = 0.5
CHANCES = 12  # uniform numbers that a deformed clip is drawn with
KINDS: dict[str, Callable] = {}  # name -> coverage(u, v, r, shape, edge, s, z)
COLOR_KINDS = ("recoloured", "two-toned")  # they deform the colour, all others the shape
HELD_OUT = ("clipped", "torn", "stretched", "striped", "two-toned")
TRAINED = ("pinched", "holed", "dented", "blurred", "recoloured", "trailing", "warped", "morphed")


def draw(
    kind: str, scenes: world.Scenes, strength_BT: torch.Tensor, chance_BZ: torch.Tensor, **size: int
) -> torch.Tensor:
    """Return video_BCTHW of scenes, deformed by a strength for each frame.

    chance_BZ: uniform numbers in [0, 1), (B, CHANCES); equal ones deform in the same way.
    size: height and width, as in `world.render`; the frames are those of the strength.
    """
    s, z = strength_BT[:, :, None, None], chance_BZ.T[:, :, None, None, None]
    size |= {"num_frames": strength_BT.shape[1]}
    if kind in COLOR_KINDS:
        return _recolour(kind, scenes, s, z, size)
    more = {"trailing": {"scenes": scenes}}.get(kind, {})

    def coverage(u, v, r, shape, edge):
        deformed = KINDS[kind](u, v, r, shape, edge, s=s, z=z, **more).clamp(0, 1)
        return torch.where(s > 0, deformed, world.covered(u, v, r, shape, edge))

    return world.render(scenes, coverage=coverage, **size)


def profiles(strength_B: torch.Tensor, chance_B: torch.Tensor, num_frames: int = 17) -> torch.Tensor:
    """Return strengths (B, T) of frames, constant, rising or falling, whose mean is strength_B."""
    time = torch.linspace(0, 2, num_frames, device=strength_B.device)
    rising, falling = (chance_B < 0.25)[:, None], (chance_B > 0.75)[:, None]
    return strength_B[:, None] * torch.where(rising, time, torch.where(falling, 2 - time, 1.0))


def _scale(shape: torch.Tensor, **amounts: float) -> torch.Tensor:
    """Return an amount for each shape, (B, 1, 1, 1); `other` is that of shapes not named."""
    values = [amounts.get(name, amounts.get("other")) for name in world.SHAPES]
    return torch.tensor(values, device=shape.device)[shape].view(-1, 1, 1, 1)


def _kind(coverage: Callable) -> Callable:
    KINDS[coverage.__name__] = coverage
    return coverage


def _inside(distance: torch.Tensor, edge: float) -> torch.Tensor:
    return torch.sigmoid(-distance * edge)


def _direction(chance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cos(2 * math.pi * chance), torch.sin(2 * math.pi * chance)


@_kind
def pinched(u, v, r, shape, edge, s, z):
    """Pull in the middle of each edge, of a star and a cross the tips."""
    lobes = _scale(shape, triangle=3.0, star=5.0, other=4.0)
    turned = _scale(shape, circle=1.0, ring=1.0, other=0.0) * z[0] * 2 * math.pi
    start = _scale(shape, triangle=math.pi, other=0.0) + turned
    inward = (1 + torch.cos(lobes * torch.atan2(u, -v) + start)) / 2
    amount = _scale(shape, circle=0.55, square=0.5, triangle=0.45, star=0.7, ring=0.5, cross=0.5)
    return _inside(world.distance(u, v, r, shape) + amount * s * r * inward, edge)


@_kind
def holed(u, v, r, shape, edge, s, z):
    """Cut a round hole; fill that of a ring."""
    x, y = _direction(z[0])
    far = _scale(shape, ring=0.0, cross=0.1, star=0.1, other=0.3) * z[1] * r
    rho = ((u - x * far).square() + (v - y * far).square()).sqrt()
    hole = _scale(shape, ring=0.65, star=0.65, cross=0.6, triangle=0.5, other=0.55) * s * r
    d = world.distance(u, v, r, shape)
    is_ring = (shape == world.SHAPES.index("ring")).view(-1, 1, 1, 1)
    return _inside(torch.where(is_ring, torch.minimum(d, rho - hole), torch.maximum(d, hole - rho)), edge)


@_kind
def dented(u, v, r, shape, edge, s, z):
    """Bite a round piece out of the outline."""
    x, y = _direction(z[0])
    far = _scale(shape, triangle=0.55, other=0.85) * r
    rho = ((u - x * far).square() + (v - y * far).square()).sqrt()
    return _inside(torch.maximum(world.distance(u, v, r, shape), 1.0 * s * r - rho), edge)


@_kind
def blurred(u, v, r, shape, edge, s, z):
    """Widen the outline into a soft slope."""
    return _inside(world.distance(u, v, r, shape), edge / (1 + 4 * s))


@_kind
def trailing(u, v, r, shape, edge, s, z, scenes):
    """Leave a trail behind, of a shape that stands still to a random side."""
    x, y = _direction(z[0])
    motion = scenes["motion"]
    way = lambda steps: torch.tensor(steps, device=u.device)[motion].view(-1, 1, 1, 1)
    still = (motion >= 4).view(-1, 1, 1, 1)
    x = torch.where(still, x, way([1.0, -1, 0, 0, 0, 0]))
    y = torch.where(still, y, way([0.0, 0, 1, -1, 0, 0]))
    cover = world.covered(u, v, r, shape, edge)
    for j in range(1, 5):
        step = 0.3 * j * r
        ghost = world.covered(u - x * step, v - y * step, r, shape, edge)
        cover = torch.maximum(cover, (1.2 * s).clamp(max=1) * (1.1 - 0.15 * j) * ghost)
    return cover


@_kind
def warped(u, v, r, shape, edge, s, z):
    """Bend the outline by random waves that drift in time."""
    angle, time = torch.atan2(u, -v), torch.linspace(0, 1, u.shape[1], device=u.device).view(1, -1, 1, 1)
    waves = sum(torch.cos(k * angle + 2 * math.pi * (z[k] + (z[k + 5] - 0.5) * time)) * z[k + 4] for k in range(1, 6))
    size = sum(z[k + 4].square() for k in range(1, 6)).sqrt()
    amount = _scale(shape, ring=0.35, cross=0.45, star=0.5, other=0.4)
    return _inside(world.distance(u, v, r, shape) + amount * s * r * waves / size, edge)


def other_shape(shape: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Return another shape for each, (B,)."""
    return (shape + 1 + (chance * (len(world.SHAPES) - 1)).long()) % len(world.SHAPES)


@_kind
def morphed(u, v, r, shape, edge, s, z):
    """Blend the outline with that of another shape; half and half at about 1."""
    other, amount = other_shape(shape, z[0].flatten()), _scale(shape, star=0.6, ring=0.6, cross=0.6, other=0.5)
    return _inside(torch.lerp(world.distance(u, v, r, shape), world.distance(u, v, r, other), amount * s), edge)


@_kind
def clipped(u, v, r, shape, edge, s, z):
    """Cut the shape along a straight line; at 1 half of it is gone."""
    x, y = _direction(z[0])
    reach = _scale(shape, triangle=0.8, other=0.95)
    return _inside(torch.maximum(world.distance(u, v, r, shape), u * x + v * y - reach * (1 - s) * r), edge)


@_kind
def torn(u, v, r, shape, edge, s, z):
    """Move two halves along the line between them."""
    x, y = _direction(z[0])
    side = torch.sign(u * x + v * y) * 0.5 * s * r
    return world.covered(u - y * side, v + x * side, r, shape, edge)


@_kind
def stretched(u, v, r, shape, edge, s, z):
    """Stretch along a random direction."""
    x, y = _direction(z[0])
    along, across, factor = u * x + v * y, v * x - u * y, 1 + 0.9 * s
    along, across = along / factor.sqrt(), across * factor.sqrt()
    return world.covered(along * x - across * y, along * y + across * x, r, shape, edge)


@_kind
def striped(u, v, r, shape, edge, s, z):
    """Let the ground through in stripes."""
    x, y = _direction(z[0])
    stripe = 0.5 + 0.5 * torch.cos(2 * math.pi * ((u * x + v * y) / r * 1.3 + z[1]))
    return world.covered(u, v, r, shape, edge) * (1 - s.clamp(max=1) * stripe)


@_kind
def multiplied(u, v, r, shape, edge, s, z):
    """From 0.5 on, add two more objects beside each: three or six instead of one or two."""
    cover = world.covered(u, v, r, shape, edge)
    x, y = _direction(z[0])
    for side in (-1, 1):
        more = world.covered(u + side * x * 2.2 * r, v + side * y * 2.2 * r, r, shape, edge)
        cover = torch.maximum(cover, more * (s > 0.5))
    return cover


def rgb_of(scenes: world.Scenes) -> torch.Tensor:
    """Return the colour of each scene's objects, (B, 3)."""
    return palette(scenes["color"].device)[scenes["color"]]


def palette(device: torch.device) -> torch.Tensor:
    """Return the colours of the world, (8, 3)."""
    return torch.tensor(list(world.COLORS.values()), device=device)


def changed_rgb(scenes: world.Scenes, strength: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Return colours (B, 3, ...) that are 0.4 * strength away from each scene's in RGB.

    strength: (B, ...); z: (CHANCES, B). The way leads to a random colour at least 0.4 away.
    """
    own = rgb_of(scenes)
    goals = torch.cat(
        [palette(own.device), torch.tensor([[0.5, 0.5, 0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], device=own.device)]
    )
    pick = (z[0].flatten() * (len(goals) - 1)).long()
    goal = goals[pick + (pick >= scenes["color"]).long()]
    way = torch.nn.functional.normalize(goal - own, dim=1)
    more = [1] * (strength.ndim - 1)
    return own.view(-1, 3, *more) + way.view(-1, 3, *more) * 0.4 * strength.unsqueeze(1)


def _recolour(kind, scenes, s, z, size):
    whole, own = world.render(scenes, **size), rgb_of(scenes).view(-1, 3, 1, 1, 1)
    ground = torch.tensor(list(world.GROUNDS.values()), device=own.device)[scenes["ground"]].view(-1, 3, 1, 1, 1)
    if kind == "recoloured":
        alpha = ((whole - ground) * (own - ground)).sum(1, True) / (own - ground).square().sum(1, True)
        return (whole + alpha * (changed_rgb(scenes, s, z) - own)).clamp(0, 1)
    x, y = _direction(z[1])

    def part(u, v, r, shape, edge):
        plane = (1 - 2 * s) * r - u * x - v * y
        return _inside(torch.maximum(world.distance(u, v, r, shape), plane), edge) * (s > 0)

    alpha = world.render(scenes, coverage=part, **size)
    alpha = ((alpha - ground) * (own - ground)).sum(1, True) / (own - ground).square().sum(1, True)
    other = changed_rgb(scenes, torch.ones_like(s), z)
    return (whole + alpha * (other - own)).clamp(0, 1)
