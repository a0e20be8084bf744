"""The curves of a run as SVG, in the colours and font of the page, which may be light or dark."""

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from rlhf.report.contact_sheet import new_figure
from rlhf.report.data import GROUPS, Run

# Placeholders, which `_inline_svg` replaces by the page's own colours.
INK, LINE, FIRST, SECOND = "#010203", "#010204", "#010205", "#010206"
PAGE_COLORS = {INK: "var(--muted)", LINE: "var(--line)", FIRST: "var(--after)", SECOND: "var(--second)"}
MAX_POINTS = 400  # of a line: more cannot be seen at this size
SIZE = (4.4, 2.5)  # inches


@dataclass
class Series:
    """Numbers by optimizer step.

    dots: draw a mark for each number. smooth: draw the running mean, and the numbers faintly.
    """

    label: str
    points: dict[int, float]
    dots: bool = False
    smooth: bool = True
    color: str = FIRST


@dataclass
class Panel:
    """A plot: its title and series, and the result's confidence interval."""

    title: str
    series: list[Series] = field(default_factory=list)
    interval: list[float] | None = None
    result_step: int | None = None  # where the interval is drawn


def panels(run: Run) -> list[Panel]:
    """Return the plots of a run: rewards, gains, hacking gap, drift, gradient, cost, measures."""
    found = [_reward_panel(run, name) for name in run.reward_names]
    gains = [
        _eval_series(run, "eval/gain_trained", "trained on", "gain_trained"),
        _eval_series(run, "eval/gain_held_out", "held out", "gain_held_out", SECOND),
    ]
    gap = _eval_series(run, "eval/hacking_gap", "", "hacking_gap")
    found.append(Panel("gain over the base, standard deviations", gains))
    found.append(Panel("hacking gap: trained minus held-out gain", [gap]))
    lines = {
        "drift": "drift from the base",
        "data_loss": "flow-matching loss on real videos",
        "grad_norm": "gradient norm, before clipping",
        "seconds": "seconds a step",
        "memory_gib": "peak memory, GiB",
        "learning_rate": "learning rate",
    }
    found += [Panel(title, [_metric_series(run, key)]) for key, title in lines.items()]
    found[-1].series[0].smooth = False  # the learning rate has no noise
    shown = {f"eval/{name}" for name in (*run.reward_names, "gain_trained", "gain_held_out", "hacking_gap")}
    logged = dict.fromkeys(key for row in run.metrics for key in row if key.startswith("eval/"))
    found += [Panel(key.removeprefix("eval/"), [_eval_series(run, key)]) for key in logged if key not in shown]
    for panel in found:
        panel.series = [series for series in panel.series if series.points]
    return [panel for panel in found if panel.series]


def _reward_panel(run: Run, name: str) -> Panel:
    """Return a reward's scores on training prompts, if trained on, and on held-out prompts."""
    group = "trained" if name in run.trained_names else "held_out"
    rows = run.summary.get(group, {})
    row = rows.get(name) or rows.get(name.removeprefix("nano_")) or {}
    held_out = _eval_series(run, f"eval/{name}", "held-out prompts", color=SECOND)
    if row:
        held_out.points |= {0: row["base"], run.result_step: row["tuned"]}
    interval = [row["base"] + end for end in row["ci95"]] if row else None
    series = [_metric_series(run, f"rewards/{name}", "training prompts"), held_out]
    return Panel(f"{name} ({GROUPS[group]})", series, interval, run.result_step)


def _metric_series(run: Run, key: str, label: str = "", **style) -> Series:
    """Return one key of metrics.jsonl over the optimizer steps; style: fields of Series."""
    return Series(label, {row["step"]: row[key] for row in run.metrics if key in row}, **style)


def _eval_series(run: Run, key: str, label: str = "", final: str = "", color: str = FIRST) -> Series:
    """Return one metric of the evaluations over the optimizer steps.

    final: key of its last value in the summary; such a metric is 0 for the base.
    """
    series = _metric_series(run, key, label, dots=True, color=color)
    if final in run.summary:
        series.points |= {0: 0.0, run.result_step: run.summary[final]}
    elif final and series.points:
        series.points[0] = 0.0
    return series


def running_mean(values: Sequence[float], span: int = 10) -> list[float]:
    """Return the mean of each value and the `span` - 1 before it."""
    return [fmean(values[max(0, end - span) : end]) for end in range(1, len(values) + 1)]


def draw_svg(panel: Panel, number: int) -> str:
    """Return the panel as an <svg> element; number: of the panel on the page, for unique ids."""
    import matplotlib

    settings = {"svg.fonttype": "none", "svg.hashsalt": str(number), "font.size": 9, "axes.edgecolor": LINE}
    settings |= dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor"), INK)
    with matplotlib.rc_context(settings):
        figure = new_figure(*SIZE)
        axis = figure.subplots()
        figure.subplots_adjust(left=0.14, right=0.98, bottom=0.17, top=0.97)
        for series in panel.series:
            _draw_series(axis, series)
        if panel.interval:
            axis.vlines(panel.result_step, *panel.interval, color=panel.series[-1].color, linewidth=1.5)
        axis.set_xlabel("optimizer step")
        axis.grid(color=LINE, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.locator_params(axis="x", nbins=5, integer=True)
        axis.locator_params(axis="y", nbins=5)
        if len(panel.series) > 1:
            axis.legend(frameon=False, fontsize=8, loc="best")
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline_svg(text.getvalue(), number, panel.title)


def _draw_series(axis, series: Series) -> None:
    """Draw a series as dots, or as a line with its running mean if it is smoothed."""
    style = {"color": series.color, "label": series.label}
    steps, values = zip(*sorted(series.points.items()), strict=True)
    if series.dots:
        axis.plot(steps, values, linewidth=1.2, marker="o", ms=4, **style)
        return
    every, strong = -(-len(steps) // MAX_POINTS), values
    if series.smooth:
        strong = running_mean(values)
        axis.plot(steps[::every], values[::every], color=series.color, linewidth=0.8, alpha=0.35)
    marker = "o" if len(strong) == 1 else ""
    axis.plot(steps[::every], strong[::every], linewidth=1.8, marker=marker, **style)


def _inline_svg(svg: str, number: int, title: str) -> str:
    """Turn an SVG file into an element with unique ids and the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="p{number}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1p{number}-", svg)
    for drawn, color in PAGE_COLORS.items():
        svg = svg.replace(drawn, color)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)  # as matplotlib 3.9 writes it
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
    opening = f'role="img" aria-label="{html.escape(title)}">'
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" {opening}', svg, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
