"""Tables and sentences of bench/results/study.json, study_long.json and the sweeps.

Means and confidence intervals are over seeds.
"""

import math
import re
import statistics
from collections.abc import Callable

from md_table import table
from study_arms import CONTROL, VARIED
from study_numbers import (
    DEFAULT,
    MEASURES,
    against_default,
    best_of_rows,
    by_arm,
    curve_of,
    gains,
    judged_along,
    mean_interval,
    named,
    seconds_until,
    turn_of,
)

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


def queries_table(result: dict) -> str:
    """Return each arm's reward queries, and its gains for 1,000 of them."""
    measures, lines = ("trained", "verifier", "motion", "diversity"), []
    for arm, rows in by_arm(result).items():
        rates = {m: [1000 * gain / rows[0]["queries"] for gain in gains(rows, m)] for m in measures}
        cells = [cell(*mean_interval(values), form_of(m)) for m, values in rates.items()]
        lines.append([named(arm, rows), format(rows[0]["queries"], ","), *cells])
    return table(["arm", "reward queries", *(MEASURES[m][0] for m in measures)], lines)


def _along(result: dict) -> list[tuple[str, list[dict]]]:
    """Return arms with the rows that were judged along the way."""
    return [(arm, judged) for arm, rows in by_arm(result).items() if (judged := judged_along(rows))]


def curves_table(result: dict) -> str:
    """Return each arm's means along the way, and where it turned."""
    lines = []
    for arm, rows in _along(result):
        curve = curve_of(rows)
        turn = turn_of(curve)
        for point in curve[1:]:
            cells = [format(point[m], form_of(m)) for m in ("trained", "verifier", "clip", "diversity")]
            mark = " (turns)" if point is turn else ""
            lines.append(
                [named(arm, rows), str(len(rows)), f"{point['steps']}{mark}", f"{point['device_seconds']:.0f}", *cells]
            )
    headings = [MEASURES[m][0] for m in ("trained", "verifier", "clip", "diversity")]
    return table(["arm", "seeds", "steps", "device-seconds", *headings], lines) if lines else ""


def turns_table(result: dict) -> str:
    """Return by arm the step after which the verifier fell while the trained reward rose."""
    lines = []
    for arm, rows in _along(result):
        curve = curve_of(rows)
        turn, end = turn_of(curve), curve[-1]
        at = [f"{turn['steps']} of {end['steps']}", f"{turn['verifier']:+.1f}"] if turn else ["no", "-"]
        lines.append([named(arm, rows), str(len(rows)), *at, f"{end['verifier']:+.1f}", f"{end['trained']:+.3f}"])
    headings = ["turns after step", "verifier there, points", "at the end", "trained reward at the end"]
    return table(["arm", "seeds", *headings], lines) if lines else ""


def equals_table(result: dict, measure: str = "verifier") -> str:
    """Return the device-seconds of training until an arm's mean equals that of each best-of-n."""
    goals = {arm: rows for arm, rows in best_of_rows(result).items() if any(row.get(measure) for row in rows)}
    means = {arm: statistics.mean(gains(rows, measure)) for arm, rows in goals.items()}
    order, lines = sorted(means, key=means.get), []
    for arm, rows in _along(result):
        found = [seconds_until(curve_of(rows), measure, means[goal]) for goal in order]
        lines.append([named(arm, rows), str(len(rows)), *("-" if s is None else f"{s:.0f}" for s in found)])
    form = form_of(measure)
    headings = [f"{named(goal, goals[goal])} ({format(means[goal], form)})" for goal in order]
    return table(["arm", "seeds", *headings], lines) if lines and order else ""


def paired_table(result: dict) -> str:
    """Return the differences of each other arm to the default recipe."""
    arms, lines = by_arm(result), []
    for arm in arms:
        found = [against_default(arms, arm, m) for m in ("trained", "verifier")] if DEFAULT in arms else [None]
        if arm != DEFAULT and None not in found:
            lines.append([named(arm, arms[arm]), cell(*found[0]), cell(*found[1], "+.1f")])
    return table(["arm", f"trained reward, less {DEFAULT}'s", "verifier, points"], lines) if lines else ""


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
    if head := about.get("head"):
        seconds = sum(head["seconds"].values())
        told = f" PRFL's head was distilled once, in {seconds:.0f} device-seconds that no budget counts.{told}"
    if later := about.get("timed_later"):
        scales = ", ".join(f"{machine['scale']:.2f}" for machine in later)
        told = f" Some arms were timed on another machine of the kind, and scaled to this one by {scales}.{told}"
    return (
        f"Measured on {about['device']} ({about['cores']} cores), torch {about['torch']}. Budget of each arm: "
        f"{about['budget_seconds']:.1f} device-seconds, the time of {about['steps']} steps of {DEFAULT}.\n"
        f"{about['eval_prompts']} held-out prompts. The base has a trained reward of {base['nano_preference']:.3f} "
        f"and a verifier accuracy of {100 * base['nano_verifier']:.1f} %.\n"
        f"{seeds_of(result)} All runs took {about['wall_seconds'] / 60:.0f} minutes.{told}\n"
    )


def seeds_of(result: dict) -> str:
    """Return which seeds the arms have, as a sentence."""
    groups: dict[str, list[str]] = {}
    for arm, rows in by_arm(result).items():
        groups.setdefault(", ".join(map(str, sorted(row["seed"] for row in rows))), []).append(arm)
    if len(groups) < 2:
        return f"Seeds of every arm: {', '.join(groups)}."
    most = max(groups, key=lambda seeds: len(groups[seeds]))
    others = "; ".join(f"{seeds} of {', '.join(arms)}" for seeds, arms in groups.items() if seeds != most)
    return f"Seeds of the arms: {most}; but {others}."


def findings(result: dict) -> str:
    """Return the highest arms, and which arms differ significantly from the default recipe."""
    arms = by_arm(result)
    lines = []
    for measure in ("verifier", "trained") if arms else ():
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
        if listed:
            lines.append(f"- {heading} against {DEFAULT}, paired by seed: {listed}.")
    return "\n".join(lines) + "\n"


def _is_main(arm: str) -> bool:
    """Return whether an arm is a method as it is, with the common budget."""
    return not arm.endswith((CONTROL, *VARIED)) and not re.fullmatch(r"best-of-\d+", arm)


def _is_varied(arm: str) -> bool:
    """Return whether an arm is the default recipe, or that with one change."""
    return arm == DEFAULT or (arm.startswith(DEFAULT) and arm.endswith((CONTROL, *VARIED)))


PARTS = {
    "conditions": conditions,
    "findings": findings,
    "gains": gains_table,
    "main": lambda result: gains_table(result, ("trained", "verifier", "diversity"), shown=_is_main),
    "varied": lambda result: gains_table(result, ("trained", "verifier", "clip", "diversity"), shown=_is_varied),
    "queries": queries_table,
    "paired": paired_table,
    "settings": settings_table,
    "curves": curves_table,
    "turns": turns_table,
    "equals": equals_table,
    "equals_trained": lambda result: equals_table(result, "trained"),
}
TABLES = {f"{name}.json#{part}": of for name in ("study", "study_long") for part, of in PARTS.items()}
TABLES |= dict.fromkeys(("study_sweep.json", "study_sweep_former_judges.json"), sweep_table)
