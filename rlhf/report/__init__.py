"""The report of a run: one HTML file that says whether the model got better, at what, and whether it cheated."""

import base64
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import quote

from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.environment import record_end
from rlhf.report.data import Run, Sample, cost, training_table
from rlhf.report.plots import draw, panels
from rlhf.run.signals import signals_interrupt
from rlhf.run_folder import run_in

logger = logging.getLogger(__name__)

REPORT, TEMPLATE = "report.html", "template.html"
MOST_BYTES = 20 * 10**6  # of the file
SHOWN_FIRST = 10  # pairs of videos; the others are a click away


@dataclass(frozen=True)
class Card:
    """A pair of videos on the page: embedded, or the addresses of files beside it."""

    sample: Sample
    before: str
    after: str
    embedded: bool


@contextmanager
def reported(folder: Path, wanted: bool) -> Iterator[None]:
    """Inside, a run. However it ends, by SIGTERM too, its report is written then, if wanted and if there was a run.

    What ended the run is what is raised, also if the report cannot be written.
    """
    try:
        with signals_interrupt():
            yield
    except ConfigError:  # no run began
        raise
    except BaseException as error:  # an interruption, too
        if wanted and run_in(folder):
            _report_failure(folder, error)
        raise
    if wanted:
        finish_report(folder)


def _report_failure(folder: Path, error: BaseException) -> None:
    try:
        finish_report(folder, f"{type(error).__name__}: {error}".removesuffix(": "))
    except BaseException as another:  # such as a second Ctrl-C, of someone who does not want to wait
        logger.warning(f"no report of the run in {folder} could be written: {type(another).__name__}: {another}")


def finish_report(folder: Path, ended_by: str | None = None) -> Path:
    """Record what a run cost, now that it is over, and what ended it, if it failed; write its report."""
    record_end(folder, ended_by)
    return write_report(folder)


def write_report(
    folder: Path,
    output: Path | None = None,
    before: Path | None = None,
    after: Path | None = None,
    most_bytes: float = MOST_BYTES,
) -> Path:
    """Write the report of a run as far as it got; return its path, by default folder/report.html.

    before, after: folders of `eval/generate.py` to show and compare instead of the run's own samples.
    most_bytes: of the file. Videos that would exceed it stay beside it, and the page refers to them by relative paths.
    """
    import jinja2

    run, output = Run(folder, before, after), Path(output or folder / REPORT)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "signed": signed}
    content = {
        "run": run,
        "title": folder.resolve().name,
        "headline": run.headline(),
        "plots": [(panel.title, draw(panel, i)) for i, panel in enumerate(panels(run))],
        "training": training_table(run.metrics),
        "settings": list(settings(run.config)),
        "cost": cost(run),
        "judges": sortable(run),
        "shown_first": SHOWN_FIRST,
    }
    template = environment.get_template(TEMPLATE)
    room = most_bytes - len(template.render(content | {"cards": []}).encode())
    text = template.render(content | {"cards": list(cards(run, output.parent, room))})
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    return output


def sortable(run: Run) -> list[str]:
    """What the videos can be sorted by: judges first, then measures."""
    seen = dict.fromkeys(name for sample in run.samples() for name in sample.scores)
    return [name for name in run.judges if name in seen] + [name for name in seen if name not in run.judges]


def cards(run: Run, beside: Path, room: float) -> Iterator[Card]:
    """The pairs of videos, the worst first; embedded while there is room, in bytes, for them."""
    first = (sortable(run) or [""])[0]
    for sample in sorted(run.samples(), key=lambda sample: sample.gains.get(first, 0.0)):
        sizes = [4 * -(-path.stat().st_size // 3) for path in (sample.before, sample.after)]
        room -= sum(sizes) + 4096  # and the text of the card
        if room >= 0:
            yield Card(sample, _embed(sample.before), _embed(sample.after), True)
        else:
            yield Card(sample, _refer(sample.before, beside), _refer(sample.after, beside), False)


def settings(config: dict) -> Iterator[tuple[str, str, str, bool]]:
    """Name, value, help and whether it is other than the default, for each setting of a run."""
    known = {field.name: field for field in fields(RewardGradientConfig)}
    default = vars(RewardGradientConfig())
    for name, value in config.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        told = known[name].metadata["help"] if name in known else ""
        yield name, text, told, value != default.get(name)


def number(value: float | None) -> str:
    """Five figures, as a table shows it."""
    return "–" if value is None else f"{value:.5g}"


def signed(value: float) -> str:
    """A difference, as a table shows it."""
    return f"{value:+.4f}".replace("-", "−")


def _embed(path: Path) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _refer(path: Path, beside: Path) -> str:
    return quote(os.path.relpath(path.resolve(), beside.resolve()))
