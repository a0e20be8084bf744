"""The choice of the denoising steps that carry the gradient: sorted, unique, from 0."""

from typing import Literal

import torch


def choose_grad_steps(
    strategy: Literal["last", "random_last", "uniform"],
    num_steps: int,
    num_grad: int,
    rng: torch.Generator | None = None,
) -> list[int]:
    """Return the steps that carry the gradient, by a published rule.

    "last": the last num_grad (DRaFT-K, arXiv 2309.17400, algorithm 1).
    "random_last": the last k, with k drawn evenly from 1 .. num_grad (AlignProp's randomised
        truncation, arXiv 2310.03739).
    "uniform": num_grad steps, num_steps // num_grad apart (DRTune, arXiv 2405.00760, algorithm 1).
        The first is drawn from all that leave room for the rest, so that every step can be chosen.

    Raises ValueError unless 1 <= num_grad <= num_steps.
    """
    if not 1 <= num_grad <= num_steps:
        raise ValueError(
            f"num_grad_steps={num_grad}, expected 1 to num_inference_steps={num_steps}: only a step that is taken can "
            "carry a gradient; lower num_grad_steps"
        )
    match strategy:
        case "last":
            return list(range(num_steps - num_grad, num_steps))
        case "random_last":
            return list(range(num_steps - 1 - draw_below(num_grad, rng), num_steps))
        case "uniform":
            apart = num_steps // num_grad
            start = draw_below(num_steps - (num_grad - 1) * apart, rng)
            return [start + i * apart for i in range(num_grad)]


def listed_grad_steps(steps: list[int] | None, num_steps: int) -> list[int]:
    """Return the given steps, sorted; raise ValueError if they cannot all be taken."""
    if not steps or len(set(steps)) < len(steps) or not all(0 <= i < num_steps for i in steps):
        raise ValueError(
            f"steps={steps}, expected different steps of 0 to {num_steps - 1} (num_inference_steps={num_steps}), "
            "at least one; correct steps in method_kwargs"
        )
    return sorted(steps)


def draw_below(count: int, rng: torch.Generator) -> int:
    """Draw one of 0 .. count-1, all equally likely."""
    return int(torch.randint(count, (), generator=rng))
