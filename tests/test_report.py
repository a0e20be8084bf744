"""The report says what the run's files say, opens in a browser without a network, plays in step and sorts."""

import json
import os
import re
import shutil
import signal
from html.parser import HTMLParser
from importlib.metadata import version

import chromium
import conftest
import pytest
import torch
from transformers import TrainerCallback

from rewards import RewardError
from rlhf import model_card, report
from rlhf.compare import summarise
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.environment import record_end, record_start
from rlhf.evaluate import Evaluation
from rlhf.report import finish_report, write_report
from rlhf.report.data import Run, cost, training_table
from rlhf.report.plots import draw, panels
from rlhf.tracking import write_samples
from rlhf.trainer import RewardGradientTrainer

NASTY = "a red fox </script><script>bad()</script> \"quoted\" & 'so' on"
PROMPTS = [NASTY, *(f"prompt number {i}" for i in range(1, 12))]
BROWSER = pytest.mark.skipif(
    chromium.find() is None, reason="no Chromium here: install one, or name it in $CHROMIUM, to test the page in it"
)


def metrics(steps: int) -> list[dict]:
    """As the trainer writes them, with evaluations after every second step."""
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "reward": 0.5 + 0.01 * step, "rewards/redness": 0.5 + 0.01 * step}
        row |= {"rewards/redness_std": 0.1, "grad_norm": 1 / step, "learning_rate": 1e-4, "seconds": 2.0}
        row |= {"drift": 0.001 * step, "memory_gib": 1.5}
        if step % 2 == 0:
            row |= {"eval/redness": 0.5 + 0.01 * step, "eval/nano_verifier": 0.4, "eval/motion": 0.01}
            row |= {"eval/gain_trained": 0.1 * step, "eval/gain_held_out": 0.0, "eval/hacking_gap": 0.1 * step}
        rows.append(row)
    return rows


def evaluations() -> list[Evaluation]:
    """Before and after: the gain of prompt i is as in GAINS."""
    before = torch.linspace(0.1, 0.9, len(PROMPTS))
    scores = {"nano_verifier": torch.ones(len(PROMPTS)), "motion": before / 50, "diversity": before[:2].clone()}
    after = scores | {"nano_verifier": torch.tensor([i % 3 > 0 for i in range(len(PROMPTS))]).float()}
    pair = scores | {"redness": before}, after | {"redness": before + GAINS}
    return [
        Evaluation(PROMPTS, {k: v.clone() for k, v in values.items()}, torch.zeros(0, dtype=torch.uint8))
        for values in pair
    ]


GAINS = torch.tensor([((5 * i) % 12 - 4) / 10 for i in range(len(PROMPTS))])


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """samples/ of step 0 and 6: a bar that moves, red before and blue after; all prompts share the two files."""
    folder = tmp_path_factory.mktemp("encoded")
    for step, channel in ((0, 0), (6, 2)):
        video = torch.zeros(1, 3, 17, 64, 96, dtype=torch.uint8)
        for t in range(17):
            video[0, channel, t, :, 5 * t : 5 * t + 12] = 230
        write_samples(folder / "samples", step, PROMPTS, video, fps=8)
        target = folder / "samples" / f"step-{step:06d}"
        for i in range(1, len(PROMPTS)):
            shutil.copy(target / "00.mp4", target / f"{i:02d}.mp4")
        (target / "prompts.txt").write_text("".join(f"{i:02d}\t{prompt}\n" for i, prompt in enumerate(PROMPTS)))
    return folder


@pytest.fixture
def started(tmp_path):
    """A run that has just begun."""
    folder = tmp_path / "my run"
    folder.mkdir()
    args = RewardGradientConfig(reward_funcs=["x.py:redness"], eval_reward_funcs=["nano_verifier"], max_steps=6)
    (folder / "config.yaml").write_text(args.to_yaml())
    record_start(folder, "cpu")
    return folder


@pytest.fixture
def finished(started, encoded):
    """A run of six steps with everything it leaves."""
    shutil.copytree(encoded / "samples", started / "samples")
    (started / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics(6)))
    base, tuned = evaluations()
    base.save(started / "evaluation" / "base.safetensors")
    tuned.save(started / "evaluation" / "tuned.safetensors")
    summary = summarise(base, tuned, ["redness"], 30.0, 6)
    summary |= {"gain_trained": 1.5, "gain_held_out": -0.25, "hacking_gap": 1.75}
    (started / "summary.json").write_text(json.dumps(summary))
    (started / "adapter").mkdir()
    return started


class Page(HTMLParser):
    """What the page holds: addresses, table cells by row, cards."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses, self.cells, self.cards, self.words, self._row = [], {}, [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.addresses += [given[name] for name in ("src", "href") if name in given]
        self._row = given.get("data-name", self._row) if tag == "tr" else self._row
        if tag == "td" and "data-value" in given:
            self.cells.setdefault(self._row, []).append(float(given["data-value"]))
        if tag == "li" and "data-gains" in given:
            self.cards.append((json.loads(given["data-gains"]), "hidden" in given))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(folder) -> Page:
    """The page of a run, without its curves, which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.report.panels", lambda run: [])
        return Page(write_report(folder).read_text(encoding="utf-8"))


# ---------------------------------------------------------------- what it says


def test_its_numbers_are_those_of_the_files(finished):
    page, rows = read(finished), metrics(6)
    summary = json.loads((finished / "summary.json").read_text())
    for name, row in {**summary["trained"], **summary["held_out"], "motion": summary["motion"]}.items():
        assert page.cells[name] == [row["base"], row["tuned"], row["diff"]]
    for name in ("reward", "grad_norm", "drift", "memory_gib", "eval/hacking_gap"):
        values = [row[name] for row in rows if name in row]
        mean = sum(values[-10:]) / len(values[-10:])
        assert page.cells[name] == pytest.approx([values[0], values[-1], mean, min(values), max(values)])
    assert set(page.cells) >= set(rows[-1]) - {"step"}


def test_all_of_the_prompts_count_in_the_share_that_rose(finished):
    row = next(row for row in Run(finished).headline() if row["name"] == "redness")
    assert (row["better"], row["equal"], row["worse"]) == ((GAINS > 0).sum(), (GAINS == 0).sum(), (GAINS < 0).sum())
    assert f"{round(100 * row['win_rate'])} % of 12" in read(finished).text


def test_worst_ten_come_first_and_the_others_are_a_click_away(finished):
    cards = read(finished).cards
    assert [gains["redness"] for gains, _ in cards] == pytest.approx(sorted(GAINS.tolist()))
    assert [hidden for _, hidden in cards] == [False] * 10 + [True] * 2


def test_prompts_without_videos_are_told(finished):
    assert "other held-out prompts" not in read(finished).text
    for folder in (finished / "samples").iterdir():
        lines = (folder / "prompts.txt").read_text().splitlines(keepends=True)
        (folder / "prompts.txt").write_text("".join(lines[:7]))
    text = read(finished).text
    assert "7 pairs, worst first. Of 5 other held-out prompts there are scores alone" in text


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
    size = write_report(finished, output, most_bytes=whole - 20_000).stat().st_size
    assert size < whole - 20_000
    page = Page(output.read_text())
    beside = [address for address in page.addresses if not address.startswith(("data:", "#"))]
    assert 0 < len(beside) < 24
    assert all((output.parent / address.replace("%20", " ")).is_file() for address in beside)
    assert "not in this file but beside it" in page.text


def test_what_was_set_and_what_it_cost(finished):
    finish_report(finished)
    text = Page((finished / "report.html").read_text()).text
    assert "eval_reward_funcs nano_verifier Judges that only evaluate" in text
    assert "time in steps 12.0 s" in text
    assert "whole run 30.0 s" in text
    assert f"torch {version('torch')}" in text
    assert "GiB of the main process" in text
    assert cost(Run(finished))["device_hours"] == pytest.approx(30 / 3600)


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


# ---------------------------------------------------------------- runs that did not get that far


def killed(folder):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics(4)) + '{"step": 5, "rew')
    return "not finished: 4 of 6 steps were done"


def single_step(folder):
    (folder / "metrics.jsonl").write_text(json.dumps(metrics(1)[0]) + "\n")
    (folder / "adapter").mkdir()
    return "finished: 1 of 6 steps"


def failed_reward(folder):
    """Failed in its first step: the file of metrics is there and empty; before, the base was evaluated."""
    (folder / "metrics.jsonl").touch()
    evaluations()[0].save(folder / "evaluation" / "base.safetensors")
    return "not finished: 0 of 6 steps were done"


def nothing(folder):
    (folder / "config.yaml").unlink()
    (folder / "environment.jsonl").unlink()
    return "not finished: 0 steps were done"


UNFINISHED = [killed, single_step, failed_reward, nothing]


@pytest.mark.parametrize("leave", UNFINISHED)
def test_a_run_that_ended_early_has_a_report(started, leave):
    status = leave(started)
    page = read(started)
    assert status in page.text
    assert "There is no evaluation before and after" in page.text
    assert "There are no videos" in page.text
    if leave is killed:
        assert page.cells["reward"][:2] == [0.51, 0.54]


def test_a_killed_run_shows_its_last_samples_without_scores(started, encoded):
    shutil.copytree(encoded / "samples", started / "samples")
    killed(started)
    page = read(started)
    assert page.cards == [({}, i >= 10) for i in range(12)]
    assert "12 pairs, without scores" in page.text


# ---------------------------------------------------------------- written by a run


@pytest.mark.parametrize("held_out", [True, False])
def test_training_ends_with_a_report(tiny_pipe, make_args, real_report, held_out):
    args = make_args(max_steps=1, num_eval_prompts=2, num_sample_prompts=2)
    held_out_prompts = conftest.PROMPTS[:2] if held_out else None
    RewardGradientTrainer(tiny_pipe, conftest.redness, args, conftest.PROMPTS, held_out_prompts).train()
    folder = report.Path(args.output_dir)
    page = Page((folder / "report.html").read_text())
    (row,) = Run(folder).metrics
    assert page.cells["loss"] == [row["loss"]] * 5
    assert "finished: 1 of 1 steps" in page.text
    assert len(page.cards) == (2 if held_out else 0)
    if held_out:
        summary = json.loads((folder / "summary.json").read_text())["trained"]["redness"]
        assert page.cells["redness"][:2] == [summary["base"], summary["tuned"]]
    assert "energy not told by the device" in page.text


class Ends(TrainerCallback):
    """Ends the run from within, after an evaluation or a step."""

    def __init__(self, event, action):
        setattr(self, event, lambda *_, **__: action())


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def turncoat(video, prompts, **info):
    assert info["step"] == 0, "no more"
    return conftest.redness(video, prompts)


ENDS = {
    "a signal before the first step": (conftest.redness, Ends("on_evaluate", terminate), "KeyboardInterrupt", 0),
    "a signal in a step": (conftest.redness, Ends("on_step_end", terminate), "stopped by a signal", 1),
    "a reward that fails": (turncoat, TrainerCallback(), "reward 'turncoat': got AssertionError: no more", 1),
    "an error elsewhere": (conftest.redness, Ends("on_log", lambda: 1 / 0), "ZeroDivisionError: division by zero", 1),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_run_that_does_not_finish_leaves_its_report_too(tiny_pipe, make_args, real_report, how):
    reward, callback, told, steps = ENDS[how]
    args = make_args(max_steps=3, num_eval_prompts=2, num_sample_prompts=0, num_diversity_prompts=0)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises((KeyboardInterrupt, RewardError, ZeroDivisionError)):
        RewardGradientTrainer(tiny_pipe, reward, args, conftest.PROMPTS, PROMPTS[:2], callbacks=[callback]).train()
    assert signal.getsignal(signal.SIGTERM) is handler
    page = Page((report.Path(args.output_dir) / "report.html").read_text())
    assert f"not finished: {steps} of 3 steps were done" in page.text
    assert "It ended with" in page.text
    assert told in page.text
    assert "s, evaluation included" in page.text, "the time until then"
    assert ("loss" in page.cells) == (steps > 0)


@pytest.mark.parametrize("another", [OSError("no room"), KeyboardInterrupt()])
def test_a_report_that_fails_does_not_hide_what_ended_the_run(started, monkeypatch, caplog, another):
    def fail(folder, ended_by):
        assert ended_by == "RuntimeError: the first"
        raise another

    monkeypatch.setattr(report, "finish_report", fail)
    with pytest.raises(RuntimeError, match="the first"), report.reported(started, True):
        raise RuntimeError("the first")
    assert f"no report of the run in {started} could be written: {type(another).__name__}" in caplog.text


def test_settings_with_which_no_run_began_leave_no_report(tmp_path, started, monkeypatch):
    monkeypatch.setattr(report, "finish_report", lambda *_: pytest.fail("written"))
    with pytest.raises(ConfigError), report.reported(started, True):
        raise ConfigError(["wrong"])
    with pytest.raises(RuntimeError), report.reported(tmp_path / "nowhere", True):
        raise RuntimeError
    with pytest.raises(RuntimeError), report.reported(started, wanted=False):
        raise RuntimeError


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = chromium.Chromium(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@BROWSER
def test_in_a_browser_it_plays_in_step_and_sorts(finished, browser, tmp_path):
    moved = tmp_path / "moved.html"
    write_report(finished, moved)
    shutil.rmtree(finished)  # the file is all that is needed
    browser.open(moved)
    browser.evaluate("id('cards').scrollIntoView()")
    times = "pairs.slice(0, 2).map(pair => [pair.left, pair.right].map(video => video.currentTime))"
    watch = f"new Promise(done => setTimeout(() => done({times}), 250))"
    frame, seen = 1 / 8, []
    for _ in range(6):
        for left, right in browser.evaluate(watch):
            assert abs(left - right) < frame
            seen.append(left)
    assert max(seen) > 0.3
    assert min(seen) < max(seen)
    browser.evaluate("(pairs[0].seek(0), pairs[0].right.currentTime = 1)")  # out of step, long before the end
    left, right = browser.evaluate(watch.replace("250", "600"))[0]
    assert left < 1.5, "not started again, which would bring them together too"
    assert abs(left - right) < frame
    colours = browser.evaluate(COLOURS)
    assert colours[0][0] > colours[0][2] + 50, "before is red"
    assert colours[1][2] > colours[1][0] + 50, "after is blue"
    first, best = browser.evaluate(f"[{ORDER}, (id('order').value = 'gain', {CHANGE}, {ORDER})]")
    assert first == pytest.approx(sorted(GAINS.tolist())[:10])
    assert best == pytest.approx(sorted(GAINS.tolist())[:1:-1])
    assert len(browser.evaluate(f"(id('more').click(), {ORDER})")) == 12
    assert browser.problems == []


ORDER = "all('.card').filter(c => !c.hidden).map(c => JSON.parse(c.dataset.gains).redness)"
CHANGE = "id('order').dispatchEvent(new Event('change'))"
COLOURS = """[pairs[0].left, pairs[0].right].map(video => {
  const canvas = document.createElement('canvas'), c = canvas.getContext('2d');
  canvas.width = video.videoWidth; canvas.height = video.videoHeight; c.drawImage(video, 0, 0);
  const d = c.getImageData(0, 0, canvas.width, canvas.height).data, sum = [0, 0, 0];
  for (let i = 0; i < d.length; i += 4) for (const k of [0, 1, 2]) sum[k] = Math.max(sum[k], d[i + k]);
  return sum;
})"""


@BROWSER
def test_the_keyboard_reaches_and_works_everything(finished, browser):
    browser.open(write_report(finished))
    browser.evaluate("playAll(false)")
    reached, names = [], "document.activeElement.id || document.activeElement.className || document.activeElement.type"
    for _ in range(60):
        browser.press("Tab")
        reached.append(browser.evaluate(names))
        if reached[-1] == "toggle":
            break
    assert [name for name in reached if name in ("play", "judge", "order", "speed", "wide")] == [
        "wide",
        "play",
        "judge",
        "order",
        "speed",
    ]
    assert browser.evaluate("pairs[0].button === document.activeElement")
    browser.press(" ")
    assert browser.evaluate("pairs[0].wanted")
    browser.press(" ")
    assert not browser.evaluate("pairs[0].wanted")
    assert browser.problems == []


@BROWSER
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_its_text_is_readable(finished, browser, dark):
    browser.open(write_report(finished), width=360, height=740, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    wider = browser.evaluate("all('.card *').filter(e => e.getBoundingClientRect().right > innerWidth + 1).length")
    assert wider == 0
    colours = browser.evaluate(
        "['--ink', '--muted', '--after', '--second', '--good', '--bad', '--page', '--panel']"
        ".map(name => getComputedStyle(document.documentElement).getPropertyValue(name).trim())"
    )
    *texts, page, panel = colours
    assert (luminance(page) < 0.1) == dark
    assert min(contrast(text, ground) for text in texts for ground in (page, panel)) >= 4.5  # WCAG 2.2, AA


def luminance(colour: str) -> float:
    """WCAG's relative luminance of #rrggbb."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@BROWSER
@pytest.mark.parametrize("leave", UNFINISHED)
def test_unfinished_runs_open_without_complaint(started, browser, leave):
    leave(started)
    browser.open(write_report(started))
    assert browser.evaluate("id('status').textContent").endswith(("done", "steps"))
    assert browser.problems == []


# ---------------------------------------------------------------- its parts


def test_curves_of_everything_that_was_logged(finished):
    titles = [panel.title for panel in panels(Run(finished))]
    assert titles == [
        "redness (trained on)",
        "nano_verifier (held out)",
        "gain over the base, in spreads",
        "hacking gap: trained less held-out gain",
        "drift from the base",
        "gradient norm, before clipping",
        "seconds a step",
        "peak memory, GiB",
        "learning rate",
        "motion",
    ]
    gap = panels(Run(finished))[3].series[0]
    assert gap.steps == [0, 2, 4, 6]
    assert gap.values == [0, 0.2, 0.4, 1.75]  # the summary's, of the adapter that was kept, at the end


def test_curves_are_in_the_colours_of_the_page_and_have_ids_of_their_own(finished):
    drawn = [draw(panel, i) for i, panel in enumerate(panels(Run(finished))[:3])]
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
    monkeypatch.setattr("rlhf.environment.energy_joules", lambda device: next(counters))
    (started / "environment.jsonl").unlink()
    (started / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics(6)))
    record_start(started, "cpu")
    record_end(started)
    found = cost(Run(started))
    assert (found["energy_kilojoules"], found["processes"]) == (4.0, 2)
    assert found["device_hours"] == pytest.approx(2 * 12 / 3600)


@pytest.mark.parametrize("template", [report.TEMPLATE, model_card.TEMPLATE])
def test_templates_are_installed_with_the_package(template):
    assert (report.Path(report.__file__).parent / template).is_file()
    import tomllib

    project = tomllib.loads((report.Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert template in project["tool"]["setuptools"]["package-data"]["rlhf.report"]
