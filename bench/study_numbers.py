"""Numbers out of the rows of bench/study.py: gains over the base, their intervals over seeds."""

import math
import statistics

from rlhf.evaluation.statistics import student_t_975

DEFAULT = "DRaFT-K"  # the default of the setting `method`
MEASURES = {  # heading, and whether the difference is in hundredths, relative to the base, or neither
    "trained": ("trained reward", None),
    "verifier": ("verifier, points", "hundredths"),
    "clip": ("CLIP score", None),
    "motion": ("motion, %", "relative"),
    "diversity": ("diversity, %", "relative"),
}


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
