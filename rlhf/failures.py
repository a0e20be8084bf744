"""Why training cannot go on, said in one paragraph."""

import functools
import math
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist

from rewards import RewardError, RewardMix
from rlhf.parallel import any_process


class TrainingError(RuntimeError):
    """Training cannot go on: why, and what to do. checkpoints/ holds the last good step."""


class Skips:
    """Optimizer steps in a row that could not be taken; most: as many as may be passed over."""

    def __init__(self, most: int):
        self.most, self.in_a_row = most, 0

    def add(self, error: Exception) -> dict:
        """Count one more; what to log of it. Raises the error if it is one too many."""
        if self.in_a_row == self.most:
            raise error
        self.in_a_row += 1
        return {"skipped": self.in_a_row, "why": str(error)}


def naming_lost_processes(method: Callable) -> Callable:
    """A method of an object with an `accelerator`; where a collective of it fails, it says which process was lost."""

    @functools.wraps(method)
    def named(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except RuntimeError as error:
            lost = self.accelerator.lifeline.lost() if _of_collective(error) else None
            if lost is None:
                raise
            raise TrainingError(f"A process was lost. {lost} ({str(error).splitlines()[0]})") from error

    return named


def _of_collective(error: RuntimeError) -> bool:
    """Whether PyTorch raised it while processes exchanged something; each backend has errors of its own."""
    inside = (frame.filename.replace("\\", "/") for frame in traceback.extract_tb(error.__traceback__))
    return isinstance(error, dist.DistError) or any("torch/distributed/" in name for name in inside)


def not_finite(
    scores: torch.Tensor, norm: float, failure: RewardError | None, rewards: RewardMix, last_batch, accelerator
) -> Exception | None:
    """What to tell of a step whose scores, of all processes, or whose gradient norm is not finite; None if they are.

    failure: what a reward raised here. last_batch: the video, the prompts and the info that each process scored last,
    None in a step without reward. All processes come to the same answer, if not to the same words.
    """
    if not torch.isfinite(scores).all():
        return failure or TrainingError("A reward failed on another process; its message says which and why.")
    if math.isfinite(norm):
        return None
    broken = broken_rewards(rewards, *last_batch) if last_batch else {}
    guilty = [name for name, bad in broken.items() if any_process(accelerator, bad)]
    source = f"the reward {', '.join(guilty)}" if guilty else "no reward, so the decoder or the transformer"
    return TrainingError(
        f"The gradient at the adapter has norm {norm}, expected a finite number; it comes from {source}. Look for "
        "sqrt, norm or log at zero there, lower learning_rate, use dtype float32, or pass over single steps with "
        "max_skipped_steps."
    )


def require_gradient(norm: float, step: int, rewards: RewardMix) -> None:
    """Raise TrainingError for a gradient norm of 0."""
    if norm == 0 and not rewards.caps:  # beyond a cap nothing is to be learnt
        raise TrainingError(
            f"The gradient at the adapter is exactly zero after {step} steps, expected a number "
            "above 0: nothing would be learnt. Look for a reward that is saturated on these videos."
        )


def broken_rewards(rewards: RewardMix, video_BCTHW: torch.Tensor, prompts: list[str], info: dict) -> dict[str, bool]:
    """Of each reward, asked alone, whether its gradient at the video is not finite."""
    broken = {}
    for name, reward in rewards.rewards.items():
        pixels = video_BCTHW.clone().requires_grad_()
        scores_B, _ = RewardMix({name: reward})(pixels, prompts, **info)
        (grad,) = torch.autograd.grad(scores_B.sum(), pixels)
        broken[name] = not bool(torch.isfinite(grad).all())
    return broken
