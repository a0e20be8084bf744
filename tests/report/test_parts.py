"""Parts of the report: curves, tables, costs, and templates installed with the package."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from report_runs import metrics

from rlhf import report
from rlhf.export import model_card
from rlhf.report.data import Run, run_cost, training_table
from rlhf.report.plots import draw_svg, panels
from rlhf.run.environment import record_end, record_start


def test_curves_of_everything_that_was_logged(finished):
    titles = [panel.title for panel in panels(Run(finished))]
    assert titles == [
        "redness (trained on)",
        "nano_verifier (held out)",
        "gain over the base, standard deviations",
        "hacking gap: trained minus held-out gain",
        "drift from the base",
        "gradient norm, before clipping",
        "seconds a step",
        "peak memory, GiB",
        "learning rate",
        "motion",
    ]
    gap = panels(Run(finished))[3].series[0]
    assert gap.points == {0: 0, 2: 0.2, 4: 0.4, 6: 1.75}  # the last is of the adapter that was kept


def test_a_best_adapter_that_was_loaded_stands_where_it_was_made(finished):
    summary = json.loads((finished / "summary.json").read_text()) | {"best": {"step": 2, "gain_held_out": -0.25}}
    (finished / "summary.json").write_text(json.dumps(summary))
    assert Run(finished).result_step == 6, "it was found, and not asked for"
    with (finished / "config.yaml").open("a") as file:
        file.write("load_best_model_at_end: true\n")
    run = Run(finished)
    assert run.status.endswith("6 of 6 steps, the result is the adapter of step 2")
    found = {panel.title: panel for panel in panels(run)}
    redness, gain = found["redness (trained on)"], found["gain over the base, standard deviations"].series[0]
    assert redness.result_step == 2
    tuned = summary["trained"]["redness"]["tuned"]
    assert redness.series[1].points | {0: 0} == pytest.approx({0: 0, 2: tuned, 4: 0.54, 6: 0.56})
    assert gain.points == pytest.approx({0: 0, 2: 1.5, 4: 0.4, 6: 0.6})


def test_curves_are_in_the_colours_of_the_page_and_have_ids_of_their_own(finished):
    drawn = [draw_svg(panel, i) for i, panel in enumerate(panels(Run(finished))[:3])]
    colours = set(re.findall(r"#[0-9a-f]{6}\b", "".join(drawn)))
    assert not colours
    assert "var(--after)" in drawn[0]
    ids = [name for svg in drawn for name in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))
    for svg in drawn:
        assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= set(ids)
        assert "font-family" not in svg


def test_training_table_by_hand():
    rows = training_table([{"step": 1, "a": 1.0}, {"step": 2, "a": 3.0, "b": 5}])
    assert rows[0] == {"name": "a", "first": 1.0, "last": 3.0, "recent": 2.0, "lowest": 1.0, "highest": 3.0, "rows": 2}
    assert (rows[1]["name"], rows[1]["rows"]) == ("b", 1)


def test_cost_of_a_run_that_was_resumed_on_two_devices(started, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    counters = iter([1000.0, 5000.0])
    monkeypatch.setattr("rlhf.run.environment.energy_joules", lambda device: next(counters))
    (started / "environment.jsonl").unlink()
    (started / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics(6)))
    record_start(started, "cpu")
    record_end(started)
    found = run_cost(Run(started))
    assert (found["energy_kilojoules"], found["processes"]) == (4.0, 2)
    assert found["device_hours"] == pytest.approx(2 * 12 / 3600)


@pytest.mark.parametrize(("room", "template"), [("report", report.TEMPLATE), ("export", model_card.TEMPLATE)])
def test_templates_are_installed_with_the_package(room, template):
    assert (Path(report.__file__).parents[1] / room / template).is_file()
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert template in project["tool"]["setuptools"]["package-data"][f"rlhf.{room}"]
