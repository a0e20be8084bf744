"""AdamW on the master weights, its learning rate, and gradient clipping."""

import math

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


def clip_gradient(gradient: torch.Tensor, norm: float, limit: float) -> None:
    """Scale a gradient of the given norm down to `limit` in place if it is longer; 0: no limit."""
    if limit and norm > limit:
        gradient *= limit / norm


def is_due(done: int, every: int) -> bool:
    """Return whether an event of every `every` steps is due after step `done`; 0: never."""
    return every > 0 and done % every == 0
