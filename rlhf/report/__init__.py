"""The report of a run: one HTML file with result, videos, curves, settings and cost."""

import base64
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import quote

from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.evaluation.statistics import INTERVAL, describe_change
from rlhf.io import write_whole
from rlhf.report.data import Run, Sample, run_cost, training_table
from rlhf.report.plots import draw_svg, panels
from rlhf.run.environment import record_end
from rlhf.run.folder import has_run
from rlhf.run.signals import interrupt_on_signals

logger = logging.getLogger(__name__)

REPORT, TEMPLATE = "report.html", "template.html"
MAX_BYTES = 20 * 10**6  # of the file
SHOWN_FIRST = 10  # pairs of videos; a click shows the others


@dataclass(frozen=True)
class Card:
    """A pair of videos on the page: embedded, or as relative paths of files beside it."""

    sample: Sample
    before: str
    after: str
    embedded: bool


@contextmanager
def report_at_end(folder: Path, wanted: bool) -> Iterator[None]:
    """Write the run's report after the block, if wanted, even after an error or SIGTERM.

    The error that ended the run is raised, also if the report cannot be written.
    """
    try:
        with interrupt_on_signals():
            yield
    except ConfigError:  # no run began
        raise
    except BaseException as error:  # an interruption, too
        if wanted and has_run(folder):
            _report_failure(folder, error)
        raise
    if wanted:
        finish_report(folder)


def _report_failure(folder: Path, error: BaseException) -> None:
    """Write the report of a failed run; if that fails too, log a warning."""
    try:
        if isinstance(error, KeyboardInterrupt):
            print(f"\nInterrupted: writing {folder / REPORT}; again to go without it", file=sys.stderr)
        finish_report(folder, _describe_end(error))
    except BaseException as another:  # such as a second Ctrl-C, of someone who does not want to wait
        reason = f"{type(another).__name__}: {another}"
        logger.warning(f"no report of the run in {folder} could be written: {reason}")


def _describe_end(error: BaseException) -> str:
    """Return what ended a run, to follow "It ended with"."""
    if not isinstance(error, KeyboardInterrupt):
        return f"{type(error).__name__}: {error}".removesuffix(": ")
    saved = getattr(error, "checkpoint", None)
    state = f"; {saved.parent.name}/{saved.name} holds its state" if saved else ""
    return f"an interruption, by Ctrl-C or a signal{state}. Go on with --resume_from_checkpoint latest."


def finish_report(folder: Path, ended_by: str | None = None) -> Path:
    """Record the cost of a run that has ended, and the error of a failed one; write its report."""
    record_end(folder, ended_by)
    return write_report(folder)


def write_report(
    folder: Path,
    output: Path | None = None,
    before: Path | None = None,
    after: Path | None = None,
    max_bytes: float = MAX_BYTES,
) -> Path:
    """Write the report of a run, finished or not; return its path.

    output: file to write (default: folder/report.html). before, after: folders of
    `eval/generate.py` to show and compare, not the run's own samples. max_bytes: size of the file;
    videos that exceed it stay beside it, as relative paths.
    """
    import jinja2

    run, output = Run(folder, before, after), Path(output or folder / REPORT)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": lambda value: "–" if value is None else f"{value:.5g}",
        "meaning": lambda row: describe_change(row["name"], row),
        "signed": lambda value: f"{value:+.4f}".replace("-", "−"),
    }
    content = {
        "run": run,
        "title": folder.resolve().name,
        "headline": run.result_rows(),
        "interval_name": INTERVAL,
        "plots": [(panel.title, draw_svg(panel, i)) for i, panel in enumerate(panels(run))],
        "training": training_table(run.metrics),
        "settings": list(settings_rows(run.config)),
        "cost": run_cost(run),
        "judges": sort_keys(run),
        "shown_first": SHOWN_FIRST,
    }
    template = environment.get_template(TEMPLATE)
    room = max_bytes - len(template.render(content | {"cards": []}).encode())
    text = template.render(content | {"cards": list(video_cards(run, output.parent, room))})
    with write_whole(output) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return output


def sort_keys(run: Run) -> list[str]:
    """Return the scores that videos can be sorted by: judges first, then measures."""
    seen = dict.fromkeys(name for sample in run.samples() for name in sample.scores)
    judges = [name for name in run.reward_names if name in seen]
    return judges + [name for name in seen if name not in run.reward_names]


def video_cards(run: Run, page_folder: Path, room: float) -> Iterator[Card]:
    """Yield the pairs of videos, worst first; embedded while `room`, in bytes, lasts."""
    first = (sort_keys(run) or [""])[0]
    link = lambda path: quote(os.path.relpath(path.resolve(), page_folder.resolve()))
    for sample in sorted(run.samples(), key=lambda sample: sample.gains.get(first, 0.0)):
        paths = (sample.before, sample.after)
        room -= sum(4 * -(-path.stat().st_size // 3) for path in paths) + 4096  # in base64, with text
        is_embedded = room >= 0
        yield Card(sample, *map(_data_url if is_embedded else link, paths), is_embedded)


def settings_rows(config: dict) -> Iterator[tuple[str, str, str, bool]]:
    """Yield each setting's name, value, help and whether the value differs from the default."""
    known = {field.name: field for field in fields(RewardGradientConfig)}
    defaults = vars(RewardGradientConfig())
    for name, value in config.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        help_text = known[name].metadata["help"] if name in known else ""
        yield name, text, help_text, value != defaults.get(name)


def _data_url(path: Path) -> str:
    """Return a video as a data URL."""
    return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
