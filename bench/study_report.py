"""Tables and sentences of bench/results/study.json and study_sweep.json.

Means and confidence intervals are over seeds.
"""

import math
import re
import statistics
from collections.abc import Callable

from md_table import table
from study_arms import CONTROL
from study_numbers import DEFAULT, MEASURES, against_default, by_arm, gains, mean_interval, named

HELD_OUT = ("verifier", "clip")


def cell(mean: float, half: float, form: str = "+.3f") -> str:
    """Return a mean with half the width of its confidence interval."""
    return format(mean, form) + ("" if math.isnan(half) else f" ± {half:{form.replace('+', '')}}")


def form_of(measure: str) -> str:
    """Return the number format of a measure."""
    return "+.1f" if MEASURES[measure][1] else "+.3f"


def gains_table(
    result: dict, measures: tuple[str, ...] = tuple(MEASURES), shown: Callable[[str], bool] = lambda arm: True
) -> str:
    """Return a row for each arm: the difference to the base with the interval over seeds."""
    headings = [MEASURES[m][0] + (" (evaluation only)" if m in HELD_OUT else "") for m in measures]
    lines = []
    for arm, rows in ((arm, rows) for arm, rows in by_arm(result).items() if shown(arm)):
        steps = f"{rows[0]['steps']}" if rows[0]["steps"] else "none"
        cells = [cell(*mean_interval(gains(rows, m)), form_of(m)) for m in measures]
        lines.append([named(arm, rows), str(len(rows)), steps, *cells])
    return table(["arm", "seeds", "steps", *headings], lines)


def cost_table(result: dict, unit: str = "device-seconds") -> str:
    """Return each arm's cost, and its gains a device minute or 1,000 reward queries."""
    key, per, form = "device_seconds", 60, ",.1f"
    if unit == "reward queries":
        key, per, form = "queries", 1000, ","
    measures, lines = ("trained", "verifier", "motion", "diversity"), []
    for arm, rows in by_arm(result).items():
        spent = rows[0][key]
        rates = {m: [per * gain / spent for gain in gains(rows, m)] for m in measures}
        cells = [cell(*mean_interval(values), form_of(m)) for m, values in rates.items()]
        lines.append([named(arm, rows), format(spent, form), *cells])
    return table(["arm", unit, *(MEASURES[m][0] for m in measures)], lines)


def paired_table(result: dict) -> str:
    """Return the differences of each other arm to the default recipe."""
    arms, lines = by_arm(result), []
    for arm in arms:
        found = [against_default(arms, arm, m) for m in ("trained", "verifier")] if DEFAULT in arms else [None]
        if arm != DEFAULT and None not in found:
            lines.append([named(arm, arms[arm]), cell(*found[0]), cell(*found[1], "+.1f")])
    return table(["arm", f"trained reward, less {DEFAULT}'s", "verifier, points"], lines)


def settings_table(result: dict) -> str:
    """Return what each arm changes in configs/nano.yaml, and the seconds of one of its steps."""
    lines = []
    for arm, rows in by_arm(result).items():
        settings, steps = ", ".join(f"{k} {v}" for k, v in rows[0]["settings"].items()), rows[0]["steps"]
        lines.append([arm, settings, f"{rows[0]['device_seconds'] / steps:.3f}" if steps else "-"])
    return table(["arm", "settings", "seconds a step, alone"], lines)


def sweep_table(result: dict) -> str:
    """Return the means over the sweep's seeds of each variant of each arm."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in result["rows"]:
        variant = ", ".join(f"{k} {v}" for k, v in row["variant"].items())
        found.setdefault((row["arm"], variant), []).append(row)
    lines = []
    for (arm, variant), rows in found.items():
        whole = [row for row in rows if "error" not in row]
        means = [f"{statistics.mean(gains(whole, m)):{form_of(m)}}" for m in ("trained", "verifier") if whole]
        lines.append([arm, variant, str(len(rows)), *(means or ["failed"] * 2)])
    headings = ["arm", "variant", "seeds", "trained reward", "verifier, points (not used to choose)"]
    return table(headings, lines)


def conditions(result: dict) -> str:
    """Return the device, the budget and the base's scores as sentences; then runs that failed."""
    about = result["environment"]
    base = about["base"]
    failed = [f"{row['arm']}, seed {row['seed']} ({row['error']})" for row in result["rows"] if "error" in row]
    told = f" Runs that failed: {'; '.join(failed)}." if failed else ""
    return (
        f"Measured on {about['device']} ({about['cores']} cores), torch {about['torch']}. Budget of each arm: "
        f"{about['budget_seconds']:.1f} device-seconds, the time of {about['steps']} steps of {DEFAULT}.\n"
        f"{about['eval_prompts']} held-out prompts. The base has a trained reward of {base['nano_preference']:.3f} "
        f"and a verifier accuracy of {100 * base['nano_verifier']:.1f} %.\n"
        f"All runs took {about['wall_seconds'] / 60:.0f} minutes.{told}\n"
    )


def findings(result: dict) -> str:
    """Return the highest arms, and which arms differ significantly from the default recipe."""
    arms = by_arm(result)
    lines = []
    for measure in ("verifier", "trained"):
        best = max(arms, key=lambda arm: statistics.mean(gains(arms[arm], measure)))
        value = cell(*mean_interval(gains(arms[best], measure)), form_of(measure))
        lines.append(f"- Highest {MEASURES[measure][0]}: {best}, {value}.")
    for measure in ("verifier", "trained") if DEFAULT in arms else ():
        groups: dict[str, list[str]] = {"higher": [], "lower": [], "no significant difference": []}
        for arm in arms:
            if arm != DEFAULT and (found := against_default(arms, arm, measure)):
                mean, half = found
                group = "no significant difference" if abs(mean) <= half else "higher" if mean > 0 else "lower"
                groups[group].append(arm)
        listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in groups.items() if names)
        heading = MEASURES[measure][0].split(",")[0].capitalize()
        lines.append(f"- {heading} against {DEFAULT}, paired by seed: {listed}.")
    return "\n".join(lines) + "\n"


def _is_main(arm: str) -> bool:
    """Return whether an arm had the common budget and no drift control."""
    return not arm.endswith(CONTROL) and not re.fullmatch(r"best-of-\d+", arm)


TABLES = {
    "study.json#conditions": conditions,
    "study.json#findings": findings,
    "study.json#gains": gains_table,
    "study.json#main": lambda result: gains_table(result, ("trained", "verifier", "motion"), shown=_is_main),
    "study.json#costs": cost_table,
    "study.json#queries": lambda result: cost_table(result, "reward queries"),
    "study.json#paired": paired_table,
    "study.json#settings": settings_table,
    "study_sweep.json": sweep_table,
}
