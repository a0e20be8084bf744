"""Is a difference more than luck? Intervals and tests over prompts, by resampling; nothing is assumed normal.

Two models are compared on the same prompts and the same noise, so each prompt has a difference of its own. N prompts,
R resamples.
"""

import math
from statistics import NormalDist

import torch

from rlhf.compare import paired, student_t_975

RESAMPLES = 5000
LEVEL = 0.05  # intervals cover with probability 1 - LEVEL; tests are wrong at most as often as LEVEL


def compared(base_N: torch.Tensor, tuned_N: torch.Tensor, seed: int = 0) -> dict:
    """One row of a comparison, over the differences tuned - base of N prompts.

    {"base", "tuned", "diff": means, "ci95": of diff, "p": sign-flip test of no difference, "better", "equal", "worse":
    prompts, "win_rate": share of better ones, equal ones counting half, "win_rate_ci95"}
    """
    difference_N = (tuned_N - base_N).double()
    wins_N = (difference_N.sign() + 1) / 2
    generator = torch.Generator().manual_seed(seed)
    return paired(base_N, tuned_N) | {
        "ci95": bootstrap_interval(difference_N, generator),
        "p": sign_flip_p(difference_N, generator),
        "better": int((difference_N > 0).sum()),
        "equal": int((difference_N == 0).sum()),
        "worse": int((difference_N < 0).sum()),
        "win_rate": wins_N.mean().item(),
        "win_rate_ci95": bootstrap_interval(wins_N, generator),
    }


def bootstrap_interval(values_N: torch.Tensor, generator: torch.Generator) -> list[float]:
    """[low, high], the 95 % interval of the mean: the bootstrap's expanded percentiles (Hesterberg, arXiv 1411.5279).

    Plain percentiles are too narrow for few values; these are taken further out, so that for normal values the interval
    is as wide as Student's. A single value has no spread: its interval is itself.
    """
    count = len(values_N)
    if count < 2:
        return [values_N.mean().item()] * 2
    rows_RN = torch.randint(count, (RESAMPLES, count), generator=generator)
    means_R = values_N.double()[rows_RN].mean(1)
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * student_t_975(count - 1))
    return means_R.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()


def sign_flip_p(difference_N: torch.Tensor, generator: torch.Generator) -> float:
    """Probability, if the two models were one, of a mean difference at least as far from 0.

    Then each difference could as well have the other sign: the observed mean is ranked among those of random signs
    (Fisher's permutation test for pairs; exact, since the observed signs count as one of the draws).
    """
    signs_RN = torch.randint(2, (RESAMPLES, len(difference_N)), generator=generator).double() * 2 - 1
    sums_R = (signs_RN @ difference_N.double()).abs()
    observed = difference_N.double().sum().abs()
    as_far = (sums_R >= observed * (1 - 1e-12)).sum().item()  # sums of the same numbers in another order are equal
    return (as_far + 1) / (RESAMPLES + 1)


def holm(p_values: list[float]) -> list[float]:
    """p-values for looking at all of them at once (Holm 1979): calling those below a level findings, the chance of one
    false finding or more stays below it."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
