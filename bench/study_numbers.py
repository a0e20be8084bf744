"""Numbers out of the rows of bench/study.py: gains over the base, their intervals over seeds."""

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path

from rlhf.evaluation.statistics import student_t_975

RESULT, LONG_RESULT = (Path(__file__).parent / "results" / f"{name}.json" for name in ("study", "study_long"))
DEFAULT = "DRaFT-K"  # the default of the setting `method`
MEASURES = {  # heading, and whether the difference is in hundredths, relative to the base, or neither
    "trained": ("trained reward", None),
    "verifier": ("verifier, points", "hundredths"),
    "clip": ("CLIP score", None),
    "motion": ("motion, %", "relative"),
    "diversity": ("diversity, %", "relative"),
}
ALONG = "trained", "verifier", "clip", "diversity"  # of a curve


def by_arm(result: dict) -> dict[str, list[dict]]:
    """Return the rows of runs that ended well by arm, the highest verifier first."""
    arms: dict[str, list[dict]] = {}
    for row in result["rows"]:
        if "error" not in row:
            arms.setdefault(row["arm"], []).append(row)
    return dict(sorted(arms.items(), key=lambda item: -statistics.mean(gains(item[1], "verifier"))))


def gains(rows: list[dict], measure: str) -> list[float]:
    """Return each seed's difference to the base, in the measure's unit."""
    kind = MEASURES[measure][1]
    return [
        100 * (row[measure]["tuned"] / row[measure]["base"] - 1)
        if kind == "relative"
        else row[measure]["diff"] * (100 if kind else 1)
        for row in rows
    ]


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half of its 95 % interval by Student's t; NaN for one value."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), student_t_975(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def against_default(arms: dict[str, list[dict]], arm: str, measure: str) -> tuple[float, float] | None:
    """Return `mean_interval` of the differences to the default recipe, seed by seed.

    Return None with fewer than two seeds in common.
    """
    ours = dict(zip((row["seed"] for row in arms[DEFAULT]), gains(arms[DEFAULT], measure), strict=True))
    pairs = [
        value - ours[row["seed"]]
        for row, value in zip(arms[arm], gains(arms[arm], measure), strict=True)
        if row["seed"] in ours
    ]
    return mean_interval(pairs) if len(pairs) > 1 else None


def named(arm: str, rows: list[dict]) -> str:
    """Return the arm's name for tables."""
    n = rows[0]["settings"].get("n")
    name = f"{arm}, n = {n}" if arm == "best-of-n" else arm
    return f"**{name}**" if arm == DEFAULT else name


def best_of_rows(result: dict) -> dict[str, list[dict]]:
    """Return the rows of best-of-n by arm: the result's, else the short study's, as it may be."""
    if not any(row["arm"].startswith("best-of") for row in result["rows"]) and RESULT.exists():
        short = json.loads(RESULT.read_text())
        if all(short["environment"][key] == result["environment"].get(key) for key in ("eval_seed", "eval_prompts")):
            result = short
    return {arm: rows for arm, rows in by_arm(result).items() if arm.startswith("best-of")}


def judged_along(rows: list[dict]) -> list[dict]:
    """Return the rows that have a curve, and after the same steps as the last of them."""
    rows = [row for row in rows if row.get("curve")]
    steps_of = lambda row: [point["steps"] for point in row["curve"]]
    return [row for row in rows if steps_of(row) == steps_of(rows[-1])]


def curve_of(rows: list[dict]) -> list[dict[str, float]]:
    """Return the means over rows of `judged_along`, from the base on; [] without rows.

    Points have steps, device_seconds and gains in the units of MEASURES.
    """
    points = [{"steps": 0, "device_seconds": 0.0} | dict.fromkeys(ALONG, 0.0)]
    for at in zip(*(row["curve"] for row in rows), strict=True):
        point = {key: at[0][key] for key in ("steps", "device_seconds")}
        for measure in ALONG:
            pairs = [(row[measure]["base"], here[measure]) for row, here in zip(rows, at, strict=True)]
            judged = [{measure: {"base": base, "tuned": tuned, "diff": tuned - base}} for base, tuned in pairs]
            point[measure] = statistics.mean(gains(judged, measure))
        points.append(point)
    return points if len(points) > 1 else []


def turn_of(curve: list[dict[str, float]], measure: str = "verifier") -> dict[str, float] | None:
    """Return the point after which the measure falls to the end while the trained reward rises."""
    highest = max(curve, key=lambda point: point[measure])
    end = curve[-1]
    return highest if highest[measure] > end[measure] and highest["trained"] < end["trained"] else None


def seconds_until(curve: list[dict[str, float]], measure: str, goal: float) -> float | None:
    """Return the device-seconds at which a curve first reaches a goal, by a line between points."""
    for before, after in pairwise(curve):
        if before[measure] < goal <= after[measure]:
            share = (goal - before[measure]) / (after[measure] - before[measure])
            return before["device_seconds"] + share * (after["device_seconds"] - before["device_seconds"])
    return None
