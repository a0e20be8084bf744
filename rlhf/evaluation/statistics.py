"""Paired comparison of two models on N held-out prompts: one confidence interval, one test.

Both models get the same prompts and the same noise, so each prompt has its own difference. Every
interval is Student's t interval of these differences, and every p-value is that of its t test. The
interval needs no random draws, and the mean of 20 or more bounded differences is close to normal
also for skewed scores and for scores that are only right or wrong.
"""

import math
from typing import TYPE_CHECKING

import torch

from rlhf.evaluation.measures import DIVERSITY, MEASURES

if TYPE_CHECKING:  # imports diffusers, which a comparison of scores does without
    from rlhf.evaluation.held_out import Evaluation

INTERVAL = "95 % confidence interval, paired t"
TOO_FEW = "too few videos to tell"
WILSON = "95 % confidence interval, Wilson"
LEVEL = 0.05  # of false findings
RELEVANT_CHANGE = 0.15  # of the base's mean: an interval that reaches further hides changes that matter
ROUNDING = 1e-6  # of float32 scores, relative, as in `rewards.mix.has_spread`
Z_975 = 1.959964  # the 97.5 % quantile of the normal distribution


def summarize(base: "Evaluation", tuned: "Evaluation", trained: list[str], seconds: float, steps: int) -> dict:
    """Return the content of summary.json, from two evaluations of the same prompts.

    {"seconds", "steps", "trained": {name: row}, "held_out": {name: row}, "motion": row,
    "saturation": row, "high_frequency": row, "diversity": row}, with rows as of `paired_interval`.
    trained: the rewards that were trained on; all others are held out, and have their name without
    the prefix "nano_", unless another judge has that name.
    """
    # In the order of the settings: a base that is read from a file may have more judges.
    rows = {n: paired_interval(base.scores[n], tuned_N) for n, tuned_N in tuned.scores.items() if len(tuned_N)}
    measures = {name: rows.pop(name, {}) for name in MEASURES}
    short = lambda name: name if (cut := name.removeprefix("nano_")) in rows else cut
    held_out = {short(name): row for name, row in rows.items() if name not in trained}
    summary = {"seconds": seconds, "steps": steps, "trained": {n: rows[n] for n in trained}}
    return summary | {"held_out": held_out} | measures


def paired_interval(base_N: torch.Tensor, tuned_N: torch.Tensor) -> dict:
    """Return the mean difference tuned - base and its 95 % confidence interval by Student's t.

    {"base", "tuned", "diff": means, "ci95": [low, high]}; without spread [diff, diff].
    """
    diff, error, count = _mean_and_error(base_N, tuned_N)
    half = student_t_975(count - 1) * error
    means = {"base": base_N.double().mean().item(), "tuned": tuned_N.double().mean().item()}
    return means | {"diff": diff, "ci95": [diff - half, diff + half]}


def describe_change(name: str, row: dict) -> str:
    """Return in words what the interval in a row of `paired_interval` says.

    name: of the judge or measure. row: with "prompts", their number, and "verdict" as in a report,
    where these are known. Only scores whose 0 means none, which are measures and verdicts, are
    compared with `RELEVANT_CHANGE`. An interval wider than the mean itself is not shown.
    """
    low, high = row["ci95"]
    if row.get("prompts") == 1:
        return "one prompt is not enough"
    if low > 0 or high < 0:
        return "higher" if low > 0 else "lower"
    half, mean = (high - low) / 2, row["base"] or row["tuned"]
    if (name in MEASURES or row.get("verdict")) and half > RELEVANT_CHANGE * mean:
        more = "num_diversity_prompts" if name == DIVERSITY else "num_eval_prompts"
        told = f"{100 * row['diff'] / mean:+.0f} ± {100 * half / mean:.0f} %: " if half < mean else ""
        return f"{told}{TOO_FEW}; raise {more}"
    return "no clear change"


def rank_correlation(a_N: torch.Tensor, b_N: torch.Tensor) -> float:
    """Return Spearman's rank correlation; equal values share the mean of their ranks.

    It is 0 where all values are equal, of which no order can be told.
    """
    ranks = torch.stack([_ranks(x_N) for x_N in (a_N, b_N)])
    if (ranks.std(1) == 0).any():
        return 0.0
    return torch.corrcoef(ranks)[0, 1].item()


def _ranks(x_N: torch.Tensor) -> torch.Tensor:
    """Return the ranks (N,), float64, from 0."""
    _, place_N, counts = x_N.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts + 1) / 2).double()[place_N]


def paired_test(base_N: torch.Tensor, tuned_N: torch.Tensor) -> dict:
    """Return `paired_interval`, the p-value of its t test, and how many prompts rose.

    Adds {"p", "better", "equal", "worse": numbers of prompts, "win_rate": share of better ones,
    equal ones counted half}. One prompt has p = 1. Differences that are all equal have no t: their
    p is that of the sign test, 2 / 2^N.
    """
    diff, error, count = _mean_and_error(base_N, tuned_N)
    no_spread_p = 2 / 2**count if diff else 1.0
    p = student_t_tail(abs(diff) / error, count - 1) if error else no_spread_p
    signs_N = (tuned_N - base_N).sign()
    better, equal, worse = (int((signs_N == sign).sum()) for sign in (1, 0, -1))
    counts = {"better": better, "equal": equal, "worse": worse, "win_rate": (better + equal / 2) / count}
    return paired_interval(base_N, tuned_N) | {"p": p} | counts


def wilson_interval(rate: float, count: int) -> list[float]:
    """Return the 95 % Wilson score interval [low, high] of a win rate in [0, 1] (Wilson 1927).

    rate: the mean of `count` independent values in [0, 1]. With values between 0 and 1, such as a
    tie counted half, their spread is smaller than that of wins alone, and the interval is too wide
    rather than too narrow. Without a value it is [0, 1].
    """
    if not count:
        return [0.0, 1.0]
    z2 = Z_975**2
    center = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_975 / (1 + z2 / count) * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2))
    return [max(0.0, center - half), min(1.0, center + half)]


def _mean_and_error(base_N: torch.Tensor, tuned_N: torch.Tensor) -> tuple[float, float, int]:
    """Return mean and standard error of the differences, and their number.

    A spread that float32 rounding of the scores explains is none, and then so is such a mean.
    """
    difference_N = (tuned_N - base_N).double()
    count, mean = len(difference_N), difference_N.mean().item()
    spread = difference_N.std().item() if count > 1 else 0.0
    rounding = ROUNDING * torch.cat([base_N, tuned_N]).abs().max().item()
    if spread > rounding:
        return mean, spread / math.sqrt(count), count
    return mean if abs(mean) > rounding else 0.0, 0.0, count


def student_t_975(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t with so many degrees of freedom.

    It is exact up to four degrees, then Cornish and Fisher's expansion, within 0.2 %.
    """
    if degrees < 5:
        return (0.0, 12.7062, 4.3027, 3.1824, 2.7764)[degrees]
    z = Z_975
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def student_t_tail(t: float, degrees: int) -> float:
    """Return the two-sided p-value of `t` >= 0 under Student's t with so many degrees of freedom.

    By the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    theta = math.atan(t / math.sqrt(degrees))
    cos2, odd = math.cos(theta) ** 2, degrees % 2
    term, total = 1.0, 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cos2 * k / (k + 1)
    inside = math.sin(theta) * total
    if odd:
        inside = 2 / math.pi * (theta + math.cos(theta) * inside)
    return max(0.0, 1.0 - inside)


def holm_correction(p_values: list[float]) -> list[float]:
    """Return p-values corrected for multiple tests, in the given order (Holm 1979).

    If those below a level count as findings, the chance of any false finding is below that level.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
