"""AdamW on the masters, its learning rate and the limit of its gradient."""

import torch

from rlhf.config import RewardGradientConfig


def make_optimizer(vector: torch.Tensor, args: RewardGradientConfig) -> torch.optim.AdamW:
    """AdamW of the vector of masters, as the settings say."""
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW([vector], betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay, fused=True)


def learning_rate(step: int, args: RewardGradientConfig) -> float:
    """Of optimizer step `step`, from 0: linear warm-up, then constant or linear to 0 at max_steps."""
    warm = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
    if args.lr_scheduler_type == "constant":
        return args.learning_rate * warm
    return args.learning_rate * min(warm, (args.max_steps - step) / max(1, args.max_steps - args.warmup_steps))


def clip_gradient(gradient: torch.Tensor, norm: float, limit: float) -> None:
    """Scale the gradient, of that norm, down to the limit if it is longer; a limit of 0 is none."""
    if limit and norm > limit:
        gradient *= limit / norm


def due(done: int, every: int) -> bool:
    """Whether something that happens each `every` steps, 0 for never, happens after `done` of them."""
    return every > 0 and done % every == 0
