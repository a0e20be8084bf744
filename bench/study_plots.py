"""The plots of the study in docs/images: `python bench/study_plots.py`."""

import json
import math
import statistics
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

sys.path.insert(0, str(Path(__file__).parents[1]))
from study_arms import CONTROL, VARIED
from study_numbers import (
    LONG_RESULT,
    MEASURES,
    RESULT,
    best_of_rows,
    by_arm,
    curve_of,
    gains,
    judged_along,
    mean_interval,
    named,
)

ROOT = Path(__file__).parents[1]
SIDES = [((6, -3), "left"), ((-6, -3), "right"), ((0, 6), "center"), ((0, -12), "center")]  # of a name, the best first


def plot_gains(result: dict, path: Path) -> None:
    """Draw each arm's gains with intervals, for the trained reward and the verifier."""
    arms = by_arm(result)
    figure, axes = _two_axes(9, 0.3 * len(arms) + 1.1)
    names = [named(arm, rows).strip("*") for arm, rows in arms.items()]
    for axis, measure in zip(axes, ("trained", "verifier"), strict=True):
        found = [mean_interval(gains(rows, measure)) for rows in arms.values()]
        for place, (arm, (mean, half)) in enumerate(zip(arms, found, strict=True)):
            axis.errorbar(mean, place, xerr=0 if math.isnan(half) else half, fmt="o", color=color_of(arm), capsize=3)
        axis.set_title(f"{MEASURES[measure][0]}, tuned less base", fontsize=10, loc="left")
        axis.axvline(0, color="#8a8f98", linewidth=1)
        axis.set_yticks(range(len(names)), names, fontsize=8)
    axes[0].invert_yaxis()
    _finish(figure, axes, path)


def plot_costs(result: dict, path: Path) -> None:
    """Draw the held-out gain against the trained gain (left) and against reward queries (right).

    An arm that cheats is low on the right of the left plot. A line leads from an arm to the one
    with drift control, which is a ring without a name.
    """
    arms = {arm: rows for arm, rows in by_arm(result).items() if not arm.endswith(tuple(VARIED))}
    figure, axes = _two_axes(9, 4.5)
    places = {
        arm: (statistics.mean(gains(rows, "trained")), rows[0]["queries"], statistics.mean(gains(rows, "verifier")))
        for arm, rows in arms.items()
    }
    for arm, place in places.items():
        plain = places.get(arm.removesuffix(CONTROL), place)
        color, fill = color_of(arm), "white" if arm.endswith(CONTROL) else color_of(arm)
        for axis, x in enumerate(place[:2]):
            axes[axis].plot([plain[axis], x], [plain[2], place[2]], color=color, linewidth=0.7, alpha=0.5, zorder=1)
            axes[axis].plot(x, place[2], "o", color=color, markerfacecolor=fill, markersize=5)
    axes[0].set_xlabel("trained reward, tuned less base", fontsize=9)
    axes[1].set_xlabel("videos that the trained reward scored", fontsize=9)
    axes[1].set_xscale("log")
    axes[0].set_ylabel("verifier, points", fontsize=9)
    for axis in axes:
        axis.margins(x=0.12)
    plain = {arm: place for arm, place in places.items() if not arm.endswith(CONTROL)}
    _finish(figure, axes, path, *({arm: (place[i], place[2]) for arm, place in plain.items()} for i in (0, 1)))


def plot_frontier(result: dict, path: Path) -> None:
    """Draw the verifier against the diversity: each arm, and the way of each method as a line.

    A dashed line joins the bests of n. The title names arms that broke down; they are off the plot.
    """
    figure = Figure(figsize=(9, 5.5))
    axis = figure.subplots()
    place = lambda rows: tuple(statistics.mean(gains(rows, m)) for m in ("diversity", "verifier"))
    arms = {arm: (rows, *place(rows)) for arm, rows in (by_arm(result) | best_of_rows(result)).items()}
    off = [f"{arm} ({x:+.0f} %, {y:+.0f} points)" for arm, (_, x, y) in arms.items() if y < 0]
    for arm, (rows, x, y) in arms.items():
        if y < 0:
            continue
        curve = curve_of(judged_along(rows)) * (not arm.endswith((CONTROL, *VARIED)))
        axis.plot([p["diversity"] for p in curve], [p["verifier"] for p in curve], color=color_of(arm), alpha=0.25)
        fill = "white" if arm.endswith(CONTROL) else color_of(arm)
        axis.plot(x, y, "o", color=color_of(arm), markerfacecolor=fill, markersize=5)
    best = [(0, 0), *sorted((x, y) for arm, (_, x, y) in arms.items() if arm.startswith("best"))[::-1]]
    axis.plot(*zip(*best, strict=True), "--", color=color_of("best"), alpha=0.5, zorder=1)
    if off:
        axis.set_title(f"Off the plot: {', '.join(off)}", fontsize=9, loc="left")
    axis.set_xlabel("diversity, tuned less base, % of the base's", fontsize=9)
    axis.set_ylabel("verifier, points", fontsize=9)
    axis.margins(x=0.12)
    _finish(figure, [axis], path, {named(arm, rows).strip("*"): (x, y) for arm, (rows, x, y) in arms.items() if y >= 0})


def color_of(arm: str) -> str:
    """Return blue: by reward gradient; orange: by scores alone; green: not trained."""
    return "#2ca02c" if arm.startswith("best") else "#e8710a" if arm.startswith(("Flow", "DDPO", "NFT")) else "#1f6feb"


def _two_axes(width: float, height: float) -> tuple[Figure, list]:
    """Return a figure of a size in inches, and its axes side by side; no display is needed."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(1, 2, sharey=True)


def _name(axis: Axes, places: dict[str, tuple[float, float]]) -> None:
    """Write names beside their points, where they cover no other if there is such a place."""
    renderer, inside = FigureCanvasAgg(axis.figure).get_renderer(), axis.get_window_extent()
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in axis.transData.transform([*places.values()])]
    for name, place in places.items():
        tries = []
        for offset, side in SIDES:
            note = axis.annotate(name, place, xytext=offset, ha=side, fontsize=7, textcoords="offset points")
            box = note.get_window_extent(renderer)
            bad = sum(box.overlaps(other) for other in taken) + (box.x0 < inside.x0 or box.x1 > inside.x1)
            tries.append((bad, len(tries), note, box))
        *_, kept, box = min(tries)
        taken.append(box)
        for *_, note, _ in tries:
            if note is not kept:
                note.remove()


def _finish(figure: Figure, axes: list, path: Path, *names: dict[str, tuple[float, float]]) -> None:
    """Write a figure. names: of each axis's points, by name."""
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    for axis, places in zip(axes, names, strict=False):
        _name(axis, places)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    measured = json.loads(RESULT.read_text())
    plot_gains(measured, ROOT / "docs" / "images" / "study_gains.png")
    plot_costs(measured, ROOT / "docs" / "images" / "study_costs.png")
    if LONG_RESULT.exists():
        plot_frontier(json.loads(LONG_RESULT.read_text()), ROOT / "docs" / "images" / "study_frontier.png")
