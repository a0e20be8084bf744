"""Intervals that cover, a test that is wrong no more often than it says, and Holm's numbers by hand."""

import pytest
import torch

from rlhf.resampling import LEVEL, bootstrap_interval, compared, holm, sign_flip_p

DRAWS = {
    "normal": (lambda n, g: 0.5 + torch.randn(n, generator=g), 0.5),
    "skewed": (lambda n, g: torch.empty(n).exponential_(generator=g), 1.0),
    "right or wrong": (lambda n, g: torch.tensor([-1.0, 0, 1])[torch.multinomial(WEIGHTS, n, True, generator=g)], 0.15),
}
WEIGHTS = torch.tensor([0.1, 0.65, 0.25])


@pytest.mark.parametrize(("kind", "count"), [(kind, n) for kind in DRAWS for n in (20, 64)])
def test_intervals_cover_as_often_as_they_say(kind, count, monkeypatch):
    monkeypatch.setattr("rlhf.resampling.RESAMPLES", 1000)
    draw, mean = DRAWS[kind]
    generator = torch.Generator().manual_seed(1)
    intervals = [bootstrap_interval(draw(count, generator), generator) for _ in range(300)]
    covered = sum(low <= mean <= high for low, high in intervals) / len(intervals)
    assert (0.91 if kind == "normal" else 0.89) <= covered <= 0.985


def test_plain_percentiles_would_be_too_narrow(monkeypatch):
    """The expansion matters for few prompts: without it the interval of five normal values covers far too rarely."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(5, generator=generator) for _ in range(300)]
    ours = sum(low <= 0 <= high for low, high in (bootstrap_interval(row, generator) for row in rows))
    monkeypatch.setattr("rlhf.resampling.student_t_975", lambda freedom: 1.96 * (4 / 5) ** 0.5)
    plain = sum(low <= 0 <= high for low, high in (bootstrap_interval(row, generator) for row in rows))
    assert plain / 300 < 0.88 < ours / 300


def test_equal_models_are_found_different_no_more_often_than_the_level():
    generator = torch.Generator().manual_seed(0)
    found = sum(sign_flip_p(torch.randn(24, generator=generator), generator) < LEVEL for _ in range(400))
    assert 4 <= found <= 35  # binomial(400, 0.05): 20 give or take 3.5 standard deviations


def test_a_shift_is_found():
    base = torch.randn(64, generator=torch.Generator().manual_seed(0))
    row = compared(base, base + 0.5 + 0.5 * torch.randn(64, generator=torch.Generator().manual_seed(1)))
    assert row["p"] < 0.001
    assert 0 < row["ci95"][0] < 0.5 < row["ci95"][1]
    assert row["better"] + row["equal"] + row["worse"] == 64
    assert row["win_rate_ci95"][0] > 0.5


def test_a_row_by_hand():
    row = compared(torch.tensor([0.0, 1, 1, 0]), torch.tensor([1.0, 1, 0, 1]))
    assert (row["base"], row["tuned"], row["diff"]) == (0.5, 0.75, 0.25)
    assert (row["better"], row["equal"], row["worse"]) == (2, 1, 1)
    assert row["win_rate"] == 0.625
    assert row["p"] > 0.9  # of the 8 signs of three ones 8 sum to 1 or more in size: every draw is as far


def test_the_test_by_hand():
    assert sign_flip_p(torch.ones(4), torch.Generator().manual_seed(0)) == pytest.approx(2 / 16, abs=0.02)
    assert sign_flip_p(torch.zeros(4), torch.Generator()) == 1.0


def test_one_prompt_and_equal_prompts_have_intervals():
    assert bootstrap_interval(torch.tensor([0.25]), torch.Generator()) == [0.25, 0.25]
    assert bootstrap_interval(torch.full((7,), 0.25), torch.Generator()) == [0.25, 0.25]


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []
