"""What bench/study.py found, put into docs/study.md and README.md with its plots: `python bench/study_report.py`.

What stands between `<!-- study: PART -->` and `<!-- end of study -->` is replaced by that part made from the results,
or by a line that nothing is measured yet. Means and intervals are over seeds.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before this folder, which has a rewards.py
from study_arms import CONTROL
from study_numbers import DEFAULT, MEASURES, against_default, by_arm, gains, mean_interval, named
from study_plots import plot_costs, plot_gains

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "bench" / "results", ROOT / "docs" / "images"
PLACE = re.compile(r"(<!-- study: (\S+) -->\n).*?(<!-- end of study -->)", re.DOTALL)
NOTHING = "Not measured yet.\n"
HELD_OUT = ("verifier", "clip")


# ---------------------------------------------------------------------------------------------------- tables


def cell(mean: float, half: float, form: str = "+.3f") -> str:
    return format(mean, form) + ("" if math.isnan(half) else f" ± {half:{form.replace('+', '')}}")


def form_of(measure: str) -> str:
    return "+.1f" if MEASURES[measure][1] else "+.3f"


def table(headings: list[str], lines: list[list[str]]) -> str:
    rows = [headings, ["---"] * len(headings), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def gains_table(
    result: dict, measures: tuple[str, ...] = tuple(MEASURES), shown: Callable[[str], bool] = lambda arm: True
) -> str:
    """A row for each arm that is shown: difference to the base with the interval over seeds."""
    headings = [MEASURES[m][0] + (" (evaluation only)" if m in HELD_OUT else "") for m in measures]
    lines = []
    for arm, rows in ((arm, rows) for arm, rows in by_arm(result).items() if shown(arm)):
        steps = f"{rows[0]['steps']}" if rows[0]["steps"] else "none"
        cells = [cell(*mean_interval(gains(rows, m)), form_of(m)) for m in measures]
        lines.append([named(arm, rows), str(len(rows)), steps, *cells])
    return table(["arm", "seeds", "steps", *headings], lines)


def cost_table(result: dict, unit: str = "device-seconds") -> str:
    """A row for each arm: what it spent, and the gains for a minute of a device, or for 1,000 reward queries."""
    key, per, form = {"device-seconds": ("device_seconds", 60, ",.1f"), "reward queries": ("queries", 1000, ",")}[unit]
    measures, lines = ("trained", "verifier", "motion", "diversity"), []
    for arm, rows in by_arm(result).items():
        spent = rows[0][key]
        cells = [cell(*mean_interval([per * gain / spent for gain in gains(rows, m)]), form_of(m)) for m in measures]
        lines.append([named(arm, rows), format(spent, form), *cells])
    return table(["arm", unit, *(MEASURES[m][0] for m in measures)], lines)


def paired_table(result: dict) -> str:
    """A row for each other arm: its differences to the default recipe."""
    arms, lines = by_arm(result), []
    for arm in arms:
        found = [against_default(arms, arm, m) for m in ("trained", "verifier")] if DEFAULT in arms else [None]
        if arm != DEFAULT and None not in found:
            lines.append([named(arm, arms[arm]), cell(*found[0]), cell(*found[1], "+.1f")])
    return table(["arm", f"trained reward, less {DEFAULT}'s", "verifier, points"], lines) if lines else NOTHING


def settings_table(result: dict) -> str:
    """What each arm changes in configs/nano.yaml, and what a step of it costs."""
    lines = []
    for arm, rows in by_arm(result).items():
        settings, steps = ", ".join(f"{k} {v}" for k, v in rows[0]["settings"].items()), rows[0]["steps"]
        lines.append([arm, settings, f"{rows[0]['device_seconds'] / steps:.3f}" if steps else "-"])
    return table(["arm", "settings", "seconds a step, alone"], lines)


def sweep_table(result: dict) -> str:
    """A row for each variant of each arm, mean over the sweep's seeds."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in result["rows"]:
        found.setdefault((row["arm"], ", ".join(f"{k} {v}" for k, v in row["variant"].items())), []).append(row)
    lines = []
    for (arm, variant), rows in found.items():
        whole = [row for row in rows if "error" not in row]
        told = (
            [f"{statistics.mean(gains(whole, m)):{form_of(m)}}" for m in ("trained", "verifier")]
            if whole
            else ["failed"] * 2
        )
        lines.append([arm, variant, str(len(rows)), *told])
    return table(["arm", "variant", "seeds", "trained reward", "verifier, points (no say in the choice)"], lines)


# -------------------------------------------------------------------------------------------------- sentences


def conditions(result: dict) -> str:
    about = result["environment"]
    base = about["base"]
    return (
        f"Measured on {about['device']} ({about['cores']} cores), torch {about['torch']}. Budget of each arm: "
        f"{about['budget_seconds']:.1f} device-seconds, the time of {about['steps']} steps of {DEFAULT}. "
        f"{about['eval_prompts']} held-out prompts; the base has a trained reward of {base['nano_preference']:.3f} and "
        f"a verifier accuracy of {100 * base['nano_verifier']:.1f} %. All of it took {about['wall_seconds'] / 60:.0f} "
        f"minutes.{failures(result)}\n"
    )


def failures(result: dict) -> str:
    failed = [f"{row['arm']}, seed {row['seed']} ({row['error']})" for row in result["rows"] if "error" in row]
    return f" Runs that failed: {'; '.join(failed)}." if failed else ""


def findings(result: dict) -> str:
    """What the numbers say, whichever arm wins."""
    arms = by_arm(result)
    lines = []
    for measure in ("verifier", "trained"):
        best = max(arms, key=lambda arm: statistics.mean(gains(arms[arm], measure)))
        value = cell(*mean_interval(gains(arms[best], measure)), form_of(measure))
        lines.append(f"- Highest {MEASURES[measure][0]}: {best}, {value}.")
    if DEFAULT in arms:
        lines += _against_default(arms)
    return "\n".join(lines) + "\n"


def _against_default(arms: dict[str, list[dict]]) -> list[str]:
    lines = []
    for measure in ("verifier", "trained"):
        groups: dict[str, list[str]] = {"higher": [], "lower": [], "not told apart from it": []}
        for arm in arms:
            if arm != DEFAULT and (found := against_default(arms, arm, measure)):
                mean, half = found
                groups["not told apart from it" if abs(mean) <= half else "higher" if mean > 0 else "lower"].append(arm)
        told = "; ".join(f"{what}: {', '.join(names)}" for what, names in groups.items() if names)
        lines.append(f"- {MEASURES[measure][0].split(',')[0].capitalize()} against {DEFAULT}, seed by seed: {told}.")
    return lines


# ------------------------------------------------------------------------------------------------------- main


def _is_main(arm: str) -> bool:
    """Of equal device time, and without drift control."""
    return not arm.endswith(CONTROL) and not re.fullmatch(r"best-of-\d+", arm)


PLOTS = {"study_gains.png": plot_gains, "study_costs.png": plot_costs}
PARTS = {
    "conditions": conditions,
    "findings": findings,
    "gains": gains_table,
    "costs": cost_table,
    "queries": lambda result: cost_table(result, "reward queries"),
    "paired": paired_table,
    "settings": settings_table,
    "sweep": sweep_table,
    "readme": lambda result: gains_table(result, ("trained", "verifier", "motion"), shown=_is_main),
    **{name: lambda result, name=name: f"![{name}](images/{name})\n" for name in PLOTS},
}


def fill(text: str, study: dict | None, sweep: dict | None) -> str:
    """The text with every marked part made anew; None for what is not measured yet."""

    def made(place: re.Match) -> str:
        result = sweep if place[2] == "sweep" else study
        return place[1] + (PARTS[place[2]](result) if result and result["rows"] else NOTHING) + place[3]

    return PLACE.sub(made, text)


def main() -> None:
    study, sweep = (
        json.loads(path.read_text()) if path.exists() else None
        for path in (RESULTS / "study.json", RESULTS / "study_sweep.json")
    )
    for name, draw in PLOTS.items() if study and study["rows"] else ():
        draw(study, IMAGES / name)
    for guide in (ROOT / "docs" / "study.md", ROOT / "README.md"):
        text = guide.read_text(encoding="utf-8")
        if (filled := fill(text, study, sweep)) != text:
            guide.write_text(filled, encoding="utf-8")
            print(f"wrote {guide.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
