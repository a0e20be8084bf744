"""The paired t interval and test against tables and by hand; the form of the summary."""

import math

import pytest
import torch

from rlhf.evaluation.held_out import Evaluation
from rlhf.evaluation.measures import MEASURES
from rlhf.evaluation.statistics import (
    LEVEL,
    describe_change,
    holm_correction,
    paired_interval,
    paired_test,
    student_t_975,
    student_t_tail,
    summarize,
)

QUANTILES = [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (127, 1.9788)]
WEIGHTS = torch.tensor([0.1, 0.65, 0.25])
DRAWS = {
    "normal": (lambda n, g: 0.5 + torch.randn(n, generator=g), 0.5),
    "skewed": (lambda n, g: torch.empty(n).exponential_(generator=g), 1.0),
    "right or wrong": (lambda n, g: torch.tensor([-1.0, 0, 1])[torch.multinomial(WEIGHTS, n, True, generator=g)], 0.15),
}


@pytest.mark.parametrize(("freedom", "quantile"), QUANTILES)
def test_students_t_is_that_of_the_tables(freedom, quantile):
    assert student_t_975(freedom) == pytest.approx(quantile, rel=1e-4 if freedom < 5 else 2e-3)
    assert student_t_tail(quantile, freedom) == pytest.approx(0.05, abs=1e-5)
    assert student_t_tail(0.0, freedom) == 1.0


def test_paired_interval_by_hand():
    row = paired_interval(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0]))  # differences 1, 2, 3: sd 1
    half = 4.3027 / math.sqrt(3)
    assert (row["base"], row["tuned"], row["diff"]) == (2.0, 4.0, 2.0)
    assert row["ci95"] == pytest.approx([2 - half, 2 + half])
    two = paired_interval(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))  # differences 1, 2: error 1 / 2
    assert two["ci95"] == pytest.approx([1.5 - 12.7062 / 2, 1.5 + 12.7062 / 2])


@pytest.mark.parametrize(("kind", "count"), [(kind, n) for kind in DRAWS for n in (20, 64)])
def test_intervals_use_the_pairs_and_cover_as_often_as_they_say(kind, count):
    draw, mean = DRAWS[kind]
    generator, covered = torch.Generator().manual_seed(1), 0
    for _ in range(400):
        base = 10 * torch.randn(count, generator=generator)  # the spread of prompts, far above that of the difference
        low, high = paired_interval(base, base + draw(count, generator))["ci95"]
        covered += low <= mean <= high
    assert (0.92 if kind == "normal" else 0.89) <= covered / 400 <= 0.985


@pytest.mark.parametrize("kind", DRAWS)
def test_equal_models_are_found_different_no_more_often_than_the_level(kind):
    draw, mean = DRAWS[kind]
    generator = torch.Generator().manual_seed(0)
    zeros = torch.zeros(24)
    found = sum(paired_test(zeros, draw(24, generator) - mean)["p"] < LEVEL for _ in range(400))
    assert 4 <= found <= 40  # binomial(400, 0.05): 20 give or take 4.4 standard deviations


def test_the_test_and_the_interval_are_one():
    generator = torch.Generator().manual_seed(2)
    for _ in range(100):
        row = paired_test(torch.zeros(12), 0.6 + torch.randn(12, generator=generator))
        assert (row["p"] < LEVEL) == (row["ci95"][0] > 0 or row["ci95"][1] < 0)


def test_a_row_by_hand():
    row = paired_test(torch.tensor([0.0, 1, 1, 0]), torch.tensor([1.0, 1, 0, 1]))
    assert (row["base"], row["tuned"], row["diff"]) == (0.5, 0.75, 0.25)
    assert (row["better"], row["equal"], row["worse"]) == (2, 1, 1)
    assert row["win_rate"] == 0.625
    assert row["p"] == pytest.approx(0.637618, abs=1e-5)  # t = 0.25 / (0.9574 / 2) at three degrees of freedom


@pytest.mark.parametrize(("shift", "count", "p"), [(0.0, 7, 1.0), (0.25, 1, 1.0), (0.25, 4, 2 / 16)])
def test_differences_without_spread_have_an_interval_and_a_p_value(shift, count, p):
    row = paired_test(torch.zeros(count), torch.full((count,), shift))
    assert row["ci95"] == [shift, shift]
    assert row["p"] == p


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_spread_that_is_rounding_is_none(dtype):
    """Of 0.2 - 0.1 and 0.3 - 0.2 the spread is 2e-17, and t would be 5e15."""
    base = torch.tensor([0.1, 0.2], dtype=dtype)
    assert paired_test(base, base + 0.1)["p"] == 0.5
    assert paired_test(base, base * (1 + 1e-7))["p"] == 1.0
    assert paired_test(base, base + torch.tensor([0.1, 0.1001], dtype=dtype))["p"] < 0.01


def test_holm_by_hand():
    assert holm_correction([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm_correction([0.6, 0.5]) == [1.0, 1.0]
    assert holm_correction([]) == []


def test_summary_has_the_agreed_form():
    def evaluation(shift):
        names = ["nano_clip", "nano_verifier", "motion", "saturation", "high_frequency"]
        scores = {name: torch.tensor([0.1, 0.2]) + shift for name in names} | {"diversity": torch.tensor([0.3]) + shift}
        return Evaluation(["a", "b"], scores, torch.zeros(0))

    summary = summarize(evaluation(0.0), evaluation(0.5), ["nano_clip"], seconds=1.5, steps=7)
    assert set(summary) == {"seconds", "steps", "trained", "held_out", *MEASURES}
    assert (summary["seconds"], summary["steps"]) == (1.5, 7)
    assert set(summary["trained"]) == {"nano_clip"}
    assert set(summary["held_out"]) == {"verifier"}
    assert set(summary["motion"]) == set(summary["held_out"]["verifier"]) == {"base", "tuned", "diff", "ci95"}
    assert summary["held_out"]["verifier"]["diff"] == pytest.approx(0.5)


def test_no_judge_takes_the_row_of_another_whose_name_it_is_but_for_the_prefix():
    def evaluation(shift):
        scores = {"trained": 0.1, "clip": 0.2, "nano_clip": 0.5, "nano_verifier": 0.7, "nano_trained": 0.9}
        scores = {name: torch.tensor([value, value + shift]) for name, value in scores.items()}
        return Evaluation(["a", "b"], scores, torch.zeros(0))

    held_out = summarize(evaluation(0.0), evaluation(0.1), ["trained"], seconds=1.0, steps=1)["held_out"]
    means = {name: row["base"] for name, row in held_out.items()}
    assert means == pytest.approx({"clip": 0.2, "nano_clip": 0.5, "verifier": 0.7, "nano_trained": 0.9})


@pytest.mark.parametrize(
    ("name", "diff", "half", "more", "meaning"),
    [
        ("diversity", -0.33, 0.34, {"prompts": 64}, "-33 ± 34 %: too few videos to tell; raise num_diversity_prompts"),
        ("motion", 0.05, 0.16, {"prompts": 64}, "+5 ± 16 %: too few videos to tell; raise num_eval_prompts"),
        (
            "right",
            0.1,
            0.2,
            {"prompts": 64, "verdict": True},
            "+10 ± 20 %: too few videos to tell; raise num_eval_prompts",
        ),
        ("diversity", 2.49, 8.01, {"prompts": 4}, "too few videos to tell; raise num_diversity_prompts"),
        ("motion", 0.05, 0.14, {}, "no clear change"),
        ("motion", 0.05, 0.04, {}, "higher"),
        ("diversity", -0.5, 0.4, {}, "lower"),
        ("any", 0.1, 9.0, {"verdict": False}, "no clear change"),
        ("motion", 0.05, 0.0, {"prompts": 1}, "one prompt is not enough"),
    ],
)
def test_a_change_is_only_called_unclear_where_the_interval_would_show_one_that_matters(
    name, diff, half, more, meaning
):
    """In the units of a base of 2, for the percentages are of the base."""
    row = {"base": 2.0, "tuned": 2.0 + 2 * diff, "diff": 2 * diff, "ci95": [2 * (diff - half), 2 * (diff + half)]}
    assert describe_change(name, row | more) == meaning


def test_a_measure_that_was_and_stays_zero_has_no_clear_change():
    assert describe_change("saturation", paired_interval(torch.zeros(3), torch.zeros(3))) == "no clear change"
    rising = paired_interval(torch.zeros(3), torch.tensor([0.0, 0.0, 1.0]))
    assert describe_change("saturation", rising) == "too few videos to tell; raise num_eval_prompts"
