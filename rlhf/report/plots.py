"""The curves of a run as SVG, in the colours and the font of the page around it, which may be light or dark."""

import html
import io
import re
from dataclasses import dataclass, field

from rlhf.figures import new_figure, running_mean
from rlhf.report.data import GROUPS, Run

# Drawn in these colours, then handed over to the page's own.
INK, LINE, FIRST, SECOND = "#010203", "#010204", "#010205", "#010206"
PAGE_COLORS = {INK: "var(--muted)", LINE: "var(--line)", FIRST: "var(--after)", SECOND: "var(--second)"}
MOST_POINTS = 400  # of a line: more can't be seen at this size
SIZE = (4.4, 2.5)  # inches


@dataclass
class Series:
    """Numbers by optimizer step. dots: a mark at each, as they are; smooth: their running mean, and they faintly."""

    label: str
    steps: list[int]
    values: list[float]
    dots: bool = False
    smooth: bool = True
    color: str = FIRST


@dataclass
class Panel:
    """One pair of axes, with its title."""

    title: str
    series: list[Series] = field(default_factory=list)
    interval: list[float] | None = None  # 95 % interval of the result
    result_step: int | None = None  # where that stands


def panels(run: Run) -> list[Panel]:
    """What there is to draw: rewards trained on and held out, gains and the gap, drift, gradient, measures, cost."""
    found = [_reward(run, name) for name in run.judges]
    found.append(
        Panel(
            "gain over the base, in spreads",
            [
                _dots(run, "eval/gain_trained", "trained on", "gain_trained"),
                _dots(run, "eval/gain_held_out", "held out", "gain_held_out", SECOND),
            ],
        )
    )
    found.append(Panel("hacking gap: trained less held-out gain", [_dots(run, "eval/hacking_gap", "", "hacking_gap")]))
    lines = {
        "drift": "drift from the base",
        "grad_norm": "gradient norm, before clipping",
        "seconds": "seconds a step",
        "memory_gib": "peak memory, GiB",
        "learning_rate": "learning rate",
    }
    found += [Panel(title, [_line(run, key)]) for key, title in lines.items()]
    found[-1].series[0].smooth = False  # the learning rate is not noisy
    known = {f"eval/{name}" for name in (*run.judges, "gain_trained", "gain_held_out", "hacking_gap")}
    others = dict.fromkeys(key for row in run.metrics for key in row if key.startswith("eval/") and key not in known)
    found += [Panel(key.removeprefix("eval/"), [_dots(run, key)]) for key in others]
    for panel in found:
        panel.series = [series for series in panel.series if series.values]
    return [panel for panel in found if panel.series]


def _reward(run: Run, name: str) -> Panel:
    """A reward on training prompts, if it is trained on, and on held-out ones from the base to the tuned model."""
    group = "trained" if name in run.trained else "held_out"
    rows = run.summary.get(group, {})
    row = rows.get(name) or rows.get(name.removeprefix("nano_")) or {}
    dots = _dots(run, f"eval/{name}", "held-out prompts")
    at = dict(zip(dots.steps, dots.values, strict=True))
    if row:
        at |= {0: row["base"], run.result_step: row["tuned"]}
    dots = Series("held-out prompts", sorted(at), [at[step] for step in sorted(at)], dots=True, color=SECOND)
    interval = [row["base"] + end for end in row["ci95"]] if row else None
    series = [_line(run, f"rewards/{name}", "training prompts"), dots]
    return Panel(f"{name} ({GROUPS[group]})", series, interval, run.result_step)


def _line(run: Run, key: str, label: str = "") -> Series:
    rows = [(row["step"], row[key]) for row in run.metrics if key in row]
    return Series(label, [step for step, _ in rows], [value for _, value in rows])


def _dots(run: Run, key: str, label: str = "", final: str = "", color: str = FIRST) -> Series:
    """An evaluation's number along the run. final: its name in the summary, for a number that is 0 at the base."""
    line = _line(run, key, label)
    if final and (line.values or final in run.summary):
        at = {0: 0.0} | dict(zip(line.steps, line.values, strict=True))
        if final in run.summary:
            at[run.result_step] = run.summary[final]
        line.steps, line.values = sorted(at), [at[step] for step in sorted(at)]
    return Series(label, line.steps, line.values, dots=True, color=color)


def draw(panel: Panel, number: int) -> str:
    """The panel as an <svg> element. number: of the panel on the page, for ids of its own."""
    import matplotlib

    settings = {"svg.fonttype": "none", "svg.hashsalt": str(number), "font.size": 9, "axes.edgecolor": LINE}
    settings |= {"text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.labelcolor": INK}
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
    return _for_page(text.getvalue(), number, panel.title)


def _draw_series(axis, series: Series) -> None:
    if series.dots:
        axis.plot(series.steps, series.values, color=series.color, linewidth=1.2, marker="o", ms=4, label=series.label)
        return
    every, style = -(-len(series.steps) // MOST_POINTS), {"color": series.color, "label": series.label}
    strong = series.values
    if series.smooth:
        strong = running_mean(series.values)
        axis.plot(series.steps[::every], series.values[::every], color=series.color, linewidth=0.8, alpha=0.35)
    axis.plot(series.steps[::every], strong[::every], linewidth=1.8, marker="o" if len(strong) == 1 else "", **style)


def _for_page(svg: str, number: int, title: str) -> str:
    """From a file to an element: its ids made unique, its colours and font the page's, its size that of its place."""
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
