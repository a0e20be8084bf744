"""AdamW on the master weights, its learning rate, and gradient clipping."""

import math
from collections.abc import Iterator

import torch

from rlhf.config import RewardGradientConfig

MOMENT_BYTES = 8  # AdamW's two float32 moments of a trained number


def make_optimizer(vector: torch.Tensor, args: RewardGradientConfig) -> torch.optim.AdamW:
    """Return fused AdamW on the vector of master weights; each step sets its learning rate."""
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW([vector], betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay, fused=True)


def learning_rate(step: int, args: RewardGradientConfig) -> float:
    """Return the learning rate of optimizer step `step`, from 0.

    It rises linearly for warmup_steps, then stays or falls to 0 at max_steps, linearly or along
    half a cosine.
    """
    warm_up = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
    if args.lr_scheduler_type == "constant":
        return args.learning_rate * warm_up
    left = min(1.0, (args.max_steps - step) / max(1, args.max_steps - args.warmup_steps))
    if args.lr_scheduler_type == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return args.learning_rate * min(warm_up, left)


def unreached_steps(max_steps: int, **every: int) -> Iterator[str]:
    """Yield a remark for each setting of every n-th step, by name, of which a run has no step."""
    for name, n in every.items():
        if n > max_steps:
            yield f"{name}={n} is above max_steps={max_steps}: no step of the run is one of them"


def slow_updates(args: RewardGradientConfig, numbers: int) -> Iterator[str]:
    """Yield why so many trained numbers move far less than `learning_rate` a step, if they do."""
    if not args.learning_rate:
        yield "learning_rate=0: no weight moves"
    if args.warmup_steps >= args.max_steps:
        share = args.max_steps / args.warmup_steps
        yield (
            f"warmup_steps={args.warmup_steps} is not below max_steps={args.max_steps}: the learning rate rises in "
            f"every step, up to {share:.2g} of learning_rate={args.learning_rate:g}"
        )
    each = args.max_grad_norm / math.sqrt(numbers)  # of a gradient that is spread evenly
    if each and (share := each / (each + args.adam_epsilon)) < 0.1:
        yield (
            f"max_grad_norm={args.max_grad_norm:g} is short beside adam_epsilon={args.adam_epsilon:g}: spread evenly "
            f"over {numbers} trained numbers, it moves each by {share:.2g} of the learning rate a step"
        )


def clip_gradient(gradient: torch.Tensor, norm: float, limit: float) -> None:
    """Scale a gradient of the given norm down to `limit` in place if it is longer; 0: no limit."""
    if limit and norm > limit:
        gradient *= limit / norm


def is_due(done: int, every: int) -> bool:
    """Return whether an event of every `every` steps is due after step `done`; 0: never."""
    return every > 0 and done % every == 0
