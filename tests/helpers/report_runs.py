"""Runs as the trainer leaves them, finished or not, written in no time; their reports."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from rlhf.config import RewardGradientConfig
from rlhf.evaluation.held_out import Evaluation
from rlhf.evaluation.statistics import summarize
from rlhf.report import write_report
from rlhf.run.environment import record_start
from rlhf.run.video import write_samples

NASTY = "a red fox </script><script>bad()</script> \"quoted\" & 'so' on"
PROMPTS = [NASTY, *(f"prompt number {i}" for i in range(1, 12))]


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


@pytest.fixture(scope="session")
def encoded(tmp_path_factory):
    """samples/ of steps 0 and 6: a moving bar, red before, blue after, equal for all prompts."""
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
    summary = summarize(base, tuned, ["redness"], 30.0, 6)
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


def read(folder: Path) -> Page:
    """The page of a run, without its curves, which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.report.panels", lambda run: [])
        return Page(write_report(folder).read_text(encoding="utf-8"))


def killed(folder):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics(4)) + '{"step": 5, "rew')
    return "not finished: 4 of 6 steps were done"


def single_step(folder):
    (folder / "metrics.jsonl").write_text(json.dumps(metrics(1)[0]) + "\n")
    (folder / "adapter").mkdir()
    return "finished: 1 of 6 steps"


def failed_reward(folder):
    """Failed in its first step, after the base was evaluated: the file of metrics is empty."""
    (folder / "metrics.jsonl").touch()
    evaluations()[0].save(folder / "evaluation" / "base.safetensors")
    return "not finished: 0 of 6 steps were done"


def nothing(folder):
    (folder / "config.yaml").unlink()
    (folder / "environment.jsonl").unlink()
    return "not finished: 0 steps were done"


UNFINISHED = [killed, single_step, failed_reward, nothing]
