"""Base against tuned: each held-out prompt's own difference, its mean and interval. N prompts."""

import math
from typing import TYPE_CHECKING

import torch

from rlhf.measures import MEASURES

if TYPE_CHECKING:  # with diffusers, which comparing scores can do without
    from rlhf.evaluate import Evaluation


def summarise(base: "Evaluation", tuned: "Evaluation", trained: list[str], seconds: float, steps: int) -> dict:
    """The content of summary.json; trained names the judges that were trained on, the others are held out.

    {"seconds", "steps", "trained": {name: row}, "held_out": {name: row}, "motion": row, "saturation": row,
    "high_frequency": row, "diversity": row}, each row {"base", "tuned", "diff", "ci95": [lo, hi]}; a held-out judge
    goes by its name without the prefix "nano_".
    """
    # In the order of the settings: a base that is read again may have other judges besides, in the order of its file.
    rows = {n: paired(base.scores[n], scores) for n, scores in tuned.scores.items() if len(scores)}
    measures = {name: rows.pop(name, {}) for name in MEASURES}
    held_out = {name.removeprefix("nano_"): row for name, row in rows.items() if name not in trained}
    return {
        "seconds": seconds,
        "steps": steps,
        "trained": {n: rows[n] for n in trained},
        "held_out": held_out,
    } | measures


def paired(base_N: torch.Tensor, tuned_N: torch.Tensor) -> dict:
    """Means, mean difference and its 95 % interval, by Student's t over the prompts' differences."""
    difference = (tuned_N - base_N).double()
    count, diff = len(difference), difference.mean().item()
    error = difference.std().item() / math.sqrt(count) if count > 1 else 0.0
    half = student_t_975(count - 1) * error
    means = {"base": base_N.double().mean().item(), "tuned": tuned_N.double().mean().item()}
    return means | {"diff": diff, "ci95": [diff - half, diff + half]}


def student_t_975(freedom: int) -> float:
    """The 97.5 % point of Student's t: exact up to two degrees of freedom, then Cornish and Fisher's expansion."""
    if freedom < 3:
        return (0.0, 12.7062, 4.3027)[freedom]
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
