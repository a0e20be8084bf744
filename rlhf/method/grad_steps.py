"""The choice of the denoising steps that carry the gradient."""

import torch

STRATEGIES = ("last", "random_last", "uniform", "listed")


def choose_grad_steps(
    strategy: str,
    num_steps: int,
    num_grad: int,
    rng: torch.Generator | None = None,
    listed: list[int] | None = None,
) -> list[int]:
    """Return the indices of the steps that carry the gradient: sorted, unique, in 0 .. num_steps-1.

    Args:
        strategy: the rule.
            "last": the last num_grad (DRaFT-K, arXiv 2309.17400, algorithm 1).
            "random_last": the last k, with k drawn evenly from 1 .. num_grad (AlignProp's
                randomised truncation, arXiv 2310.03739).
            "uniform": num_grad steps, num_steps // num_grad apart (DRTune, arXiv 2405.00760,
                algorithm 1). The first is drawn from all that leave room for the rest, so that
                every step can be chosen.
            "listed": the steps of `listed`; num_grad is ignored.
        rng: drawn from by "random_last" and "uniform" alone.

    Raises ValueError for an impossible choice.
    """
    if strategy == "listed":
        return _check_listed(listed, num_steps)
    if not 1 <= num_grad <= num_steps:
        raise ValueError(
            f"num_grad_steps={num_grad}, expected 1 to num_inference_steps={num_steps}: only a step that is taken can "
            "carry a gradient; lower num_grad_steps"
        )
    if strategy == "last":
        return list(range(num_steps - num_grad, num_steps))
    if strategy == "random_last":
        return list(range(num_steps - 1 - draw_below(num_grad, rng), num_steps))
    if strategy == "uniform":
        apart = num_steps // num_grad
        start = draw_below(num_steps - (num_grad - 1) * apart, rng)
        return [start + i * apart for i in range(num_grad)]
    raise ValueError(f"strategy={strategy!r}, expected one of {', '.join(STRATEGIES)}; use one of these")


def _check_listed(listed: list[int] | None, num_steps: int) -> list[int]:
    """Return the listed steps sorted; raise ValueError if none, repeated or out of range."""
    if not listed or len(set(listed)) < len(listed) or not all(0 <= i < num_steps for i in listed):
        raise ValueError(
            f"steps={listed}, expected different steps of 0 to {num_steps - 1} (num_inference_steps={num_steps}), "
            "at least one; correct steps in method_kwargs"
        )
    return sorted(listed)


def draw_below(count: int, rng: torch.Generator) -> int:
    """Draw one of 0 .. count-1, all equally likely."""
    return int(torch.randint(count, (), generator=rng))
