"""Paired statistics against numbers worked out by hand, and the exact form of the summary."""

import math

import pytest
import torch

from rlhf.compare import paired, student_t_975, summarise
from rlhf.evaluate import Evaluation
from rlhf.measures import MEASURES


@pytest.mark.parametrize(
    ("freedom", "value"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (127, 1.9788)],
)
def test_students_t_is_that_of_the_tables(freedom, value):
    assert student_t_975(freedom) == pytest.approx(value, rel=0.02 if freedom < 5 else 2e-3)


def test_paired_interval_by_hand():
    row = paired(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0]))  # differences 1, 2, 3: sd 1
    half = 4.3027 / math.sqrt(3)
    assert (row["base"], row["tuned"], row["diff"]) == (2.0, 4.0, 2.0)
    assert row["ci95"] == pytest.approx([2 - half, 2 + half])
    two = paired(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))  # differences 1, 2: error 1 / 2
    assert two["ci95"] == pytest.approx([1.5 - 12.7062 / 2, 1.5 + 12.7062 / 2])


def test_interval_uses_the_pairs_and_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        base = 10 * torch.randn(20, generator=generator)  # the spread of prompts, far above that of the difference
        row = paired(base, base + 0.5 + torch.randn(20, generator=generator))
        covered += row["ci95"][0] <= 0.5 <= row["ci95"][1]
    assert 0.92 <= covered / 400 <= 0.98


def test_equal_models_have_no_difference():
    scores = torch.rand(5)
    assert paired(scores, scores)["ci95"] == [0.0, 0.0]


def test_summary_has_the_agreed_form():
    def evaluation(shift):
        names = ["nano_clip", "nano_verifier", "motion", "saturation", "high_frequency"]
        scores = {name: torch.tensor([0.1, 0.2]) + shift for name in names} | {"diversity": torch.tensor([0.3]) + shift}
        return Evaluation(["a", "b"], scores, torch.zeros(0))

    summary = summarise(evaluation(0.0), evaluation(0.5), ["nano_clip"], seconds=1.5, steps=7)
    assert set(summary) == {"seconds", "steps", "trained", "held_out", *MEASURES}
    assert (summary["seconds"], summary["steps"]) == (1.5, 7)
    assert set(summary["trained"]) == {"nano_clip"}
    assert set(summary["held_out"]) == {"verifier"}
    assert set(summary["motion"]) == set(summary["held_out"]["verifier"]) == {"base", "tuned", "diff", "ci95"}
    assert summary["held_out"]["verifier"]["diff"] == pytest.approx(0.5)
