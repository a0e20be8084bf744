"""The report has the numbers of the run's files, also for an unfinished run."""

import dataclasses
import json
import re
import shutil
from importlib.metadata import version

import pytest
from report_runs import GAINS, NASTY, PROMPTS, UNFINISHED, Page, killed, metrics, read
from scripts import script

from rlhf.config import RewardGradientConfig
from rlhf.evaluation.held_out import Evaluation
from rlhf.evaluation.statistics import summarize
from rlhf.io import DamagedFileError
from rlhf.report import finish_report, write_report
from rlhf.report.data import Run, run_cost
from rlhf.run.environment import record_end, record_start


def test_its_numbers_are_those_of_the_files(finished):
    page, rows = read(finished), metrics(6)
    summary = json.loads((finished / "summary.json").read_text())
    summary["held_out"]["nano_verifier"] = summary["held_out"].pop("verifier")  # its name in every other table
    for name, row in {**summary["trained"], **summary["held_out"], "motion": summary["motion"]}.items():
        assert page.cells[name] == [row["base"], row["tuned"], row["diff"]]
    for name in ("reward", "grad_norm", "drift", "memory_gib", "eval/hacking_gap"):
        values = [row[name] for row in rows if name in row]
        mean = sum(values[-10:]) / len(values[-10:])
        assert page.cells[name] == pytest.approx([values[0], values[-1], mean, min(values), max(values)])
    assert set(page.cells) >= set(rows[-1]) - {"step"}
    assert "After training, 8 of 12 held-out prompts are shown right; before, 12." in page.text


def test_the_size_is_told_where_the_evaluation_has_its_own(finished):
    assert "judged at" not in read(finished).text
    config = finished / "config.yaml"
    before = config.read_text()
    args = RewardGradientConfig(height=32, width=48, num_frames=9, eval_size={"height": 64, "num_frames": 9})
    try:
        config.write_text(args.to_yaml())
        told = "judged at 64x48 with 9 frames; training used 32x48 with 9 frames."
        assert told in read(finished).text
    finally:
        config.write_text(before)


def test_all_of_the_prompts_count_in_the_share_that_rose(finished):
    row = next(row for row in Run(finished).result_rows() if row["name"] == "redness")
    assert (row["better"], row["equal"], row["worse"]) == ((GAINS > 0).sum(), (GAINS == 0).sum(), (GAINS < 0).sum())
    assert f"{round(100 * row['win_rate'])} % of 12" in read(finished).text


def test_worst_ten_come_first_and_the_others_are_a_click_away(finished):
    cards = read(finished).cards
    assert [gains["redness"] for gains, _ in cards] == pytest.approx(sorted(GAINS.tolist()))
    assert [hidden for _, hidden in cards] == [False] * 10 + [True] * 2


@pytest.mark.parametrize("change", [{"reward_weights": [-1.0]}, {"reward_targets": {"redness": 0.0}}])
def test_a_reward_that_is_lowered_or_has_a_target_is_worst_where_it_moved_away(finished, monkeypatch, change):
    monkeypatch.setattr(Run, "config", Run(finished).config | {"reward_weights": None} | change)
    for sample in Run(finished).samples():
        before, after = sample.scores["redness"]
        assert sample.gains["redness"] == (abs(before) - abs(after) if "reward_targets" in change else before - after)
    assert sum(sample.gains["redness"] < 0 for sample in Run(finished).samples())


def test_the_report_names_the_verdict_of_every_row(finished):
    summary = json.loads((finished / "summary.json").read_text())
    summary["diversity"] |= {"base": 0.5, "diff": -0.1, "ci95": [-0.2, 0.0]}
    (finished / "summary.json").write_text(json.dumps(summary))
    page = read(finished)
    assert "-20 ± 20 %: too few videos to tell; raise num_diversity_prompts" in page.text
    assert page.text.count("no clear change") == 3  # of measures that stayed as they were


@pytest.mark.parametrize("aim", [{"reward_targets": {"redness": 0.3}}, {"reward_weights": [-1.0]}])
def test_more_of_a_reward_that_is_not_to_rise_is_neither_good_nor_bad(finished, aim):
    summary = json.loads((finished / "summary.json").read_text())
    summary["trained"]["redness"] |= {"diff": 0.2, "ci95": [0.1, 0.3]}
    (finished / "summary.json").write_text(json.dumps(summary))
    tile = lambda: re.search(r'redness, [^<]*</dt><dd class="(\w+)">', write_report(finished).read_text())[1]
    assert tile() == "up"
    args = RewardGradientConfig(reward_funcs=["x.py:redness"], **aim)
    (finished / "config.yaml").write_text(args.to_yaml())
    assert tile() == "unclear"


def test_prompts_without_videos_are_told(finished):
    assert "other held-out prompts" not in read(finished).text
    for folder in (finished / "samples").iterdir():
        lines = (folder / "prompts.txt").read_text().splitlines(keepends=True)
        (folder / "prompts.txt").write_text("".join(lines[:7]))
    text = read(finished).text
    assert "7 pairs, worst first. 5 other held-out prompts have scores alone" in text


def test_a_prompt_is_text_whatever_is_in_it(finished):
    page = read(finished)
    assert NASTY in page.text
    assert "<script>bad" not in (finished / "report.html").read_text()


def test_it_asks_for_nothing_else(finished):
    page = read(finished)
    assert len([a for a in page.addresses if a.startswith("data:video/mp4;base64,")]) == 24
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"@import|url\((?!#)", (finished / "report.html").read_text())


def test_videos_beyond_the_size_stay_beside_it(finished, tmp_path):
    whole = write_report(finished).stat().st_size
    output = tmp_path / "elsewhere" / "r.html"
    size = write_report(finished, output, max_bytes=whole - 20_000).stat().st_size
    assert size < whole - 20_000
    page = Page(output.read_text())
    beside = [address for address in page.addresses if not address.startswith(("data:", "#"))]
    assert 0 < len(beside) < 24
    assert all((output.parent / address.replace("%20", " ")).is_file() for address in beside)
    assert "not in this file but beside it" in page.text
    assert script("eval/report.py").main([str(finished), "--output", str(output), "--max_mb", "inf"]) == 0
    assert output.stat().st_size == whole


def test_what_was_set_and_what_it_cost(finished):
    finish_report(finished)
    text = Page((finished / "report.html").read_text()).text
    explained = {field.name: field.metadata["help"] for field in dataclasses.fields(RewardGradientConfig)}
    assert f"eval_reward_funcs nano_verifier {explained['eval_reward_funcs']}" in text
    assert "time in steps 12.0 s" in text
    assert "whole run 30.0 s" in text
    assert f"torch {version('torch')}" in text
    assert "GiB of the main process" in text
    assert run_cost(Run(finished))["device_hours"] == pytest.approx(30 / 3600)


def test_it_can_show_other_videos(finished, encoded, tmp_path):
    for name, step, shift in (("a", 0, 0.0), ("b", 6, 0.5)):
        shutil.copytree(encoded / "samples" / f"step-{step:06d}", tmp_path / name)
        rows = [
            {"file": f"{i:02d}.mp4", "prompt": prompt, "seed": 0, "scores": {"sharp": i / 10 + shift}}
            for i, prompt in enumerate(PROMPTS)
        ]
        (tmp_path / name / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report(finished, tmp_path / "r.html", tmp_path / "a", tmp_path / "b").read_text()
    page = Page(text)
    assert page.cells["sharp"][2] == pytest.approx(0.5)
    assert [gains["sharp"] for gains, _ in page.cards] == pytest.approx([0.5] * 12)


@pytest.mark.parametrize("leave", UNFINISHED)
def test_a_run_that_ended_early_has_a_report(started, leave):
    status = leave(started)
    page = read(started)
    assert status in page.text
    assert "There is no evaluation before and after" in page.text
    assert "There are no videos" in page.text
    if leave is killed:
        assert page.cells["reward"][:2] == [0.51, 0.54]


def test_a_run_that_went_on_and_was_killed_or_failed_is_not_finished(finished):
    """Although the adapter and the result of its first end are still there."""
    assert "finished: 6 of 6 steps" in Run(finished).status
    rows = Run(finished).result_rows()
    record_start(finished, "cpu")
    assert Run(finished).status.startswith("not finished"), "killed, or still running"
    record_end(finished, "RewardError: broken")
    assert Run(finished).status.startswith("not finished")
    assert Run(finished).result_rows() == [], "the base may have been judged anew since"
    assert not any(sample.scores for sample in Run(finished).samples())
    record_start(finished, "cpu")
    record_end(finished)
    assert Run(finished).status == "finished: 6 of 6 steps"
    assert Run(finished).result_rows() == rows != []


def test_seconds_are_those_of_all_parts(started):
    assert "Its end was not recorded: it was killed, or it still runs." in read(started).text
    record_end(started, "an interruption")
    path = started / "environment.jsonl"
    row = json.loads(path.read_text())
    killed = {name: value for name, value in row.items() if name != "seconds"}
    rows = [row | {"seconds": 20.0}, killed, row | {"seconds": 5.5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {}]))
    text = read(started).text
    assert "It ended with an interruption" in text
    assert "whole run 25.5 s, evaluation included, all 3 starts but those that were killed" in text


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "",
        '{"seconds": 3}',
        '{"steps": "6"}',
        '{"steps": 6, "trained": [1]}',
        '{"steps": 6, "trained": {"a": {}}}',
    ],
)
def test_a_damaged_summary_is_told(finished, text):
    (finished / "summary.json").write_text(text)
    with pytest.raises(DamagedFileError, match="summary.json: got a damaged file"):
        read(finished)


def test_one_prompt_makes_no_verdict(finished):
    ones = []
    for path in (finished / "evaluation" / f"{name}.safetensors" for name in ("base", "tuned")):
        whole = Evaluation.load(path)
        scores = {judge: values[:1] for judge, values in whole.scores.items()}
        ones.append(dataclasses.replace(whole, prompts=whole.prompts[:1], scores=scores))
        ones[-1].save(path)
    (finished / "summary.json").write_text(json.dumps(summarize(*ones, ["redness"], 30.0, 6)))
    page = read(finished)
    assert page.cells["redness"][2] != 0
    assert page.text.count("one prompt is not enough") > 2
    assert "no clear change" not in page.text
    assert "lower" not in page.text


def test_a_killed_run_shows_its_last_samples_without_scores(started, encoded):
    shutil.copytree(encoded / "samples", started / "samples")
    killed(started)
    page = read(started)
    assert page.cards == [({}, i >= 10) for i in range(12)]
    assert "12 pairs, without scores" in page.text
