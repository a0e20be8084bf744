"""AdamW on the masters, its learning rate and the limit of its gradient."""

import importlib.util

import torch

from rlhf.config import RewardGradientConfig

EIGHT_BIT = "adamw_bnb_8bit"
OPTIMIZERS = ("adamw_torch_fused", EIGHT_BIT)  # transformers' names
MOST_OF_EIGHT_BITS = 2**31 - 1  # numbers of one tensor: bitsandbytes' kernels take their count as an int32


def make_optimizer(vector: torch.Tensor, args: RewardGradientConfig) -> torch.optim.Optimizer:
    """AdamW of the vector of masters, as the settings say.

    With 8 bits its moments are rounded by blocks of 256 (arXiv 2110.02861), by bitsandbytes. Raises ImportError where
    that is not installed.
    """
    settings = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    settings |= {"weight_decay": args.weight_decay}
    if args.optim == EIGHT_BIT:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit([vector], **settings)
    return torch.optim.AdamW([vector], fused=True, **settings)


def missing_optimizer(name: str) -> str | None:
    """What to say where the library of an optimizer is not installed; None where it is, or none is needed."""
    if name != EIGHT_BIT or importlib.util.find_spec("bitsandbytes"):
        return None
    return f"optim={name} needs bitsandbytes, which is not installed; pip install bitsandbytes, or leave it out"


def moment_bytes(args: RewardGradientConfig) -> float:
    """Bytes of the two moments of a trained number; those of 8 bits with a scale for each 256."""
    return 2 * (1 + 4 / 256) if args.optim == EIGHT_BIT else 8


def learning_rate(step: int, args: RewardGradientConfig) -> float:
    """The rate of optimizer step `step`, from 0: linear warm-up, then constant or linear to 0 at max_steps."""
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
