"""From scores to the loss whose gradient trains the adapter."""

from collections.abc import Callable

import torch

from rewards import RewardMix
from rlhf.types import Prompt, reworded


def reward_loss(scores_B: torch.Tensor) -> torch.Tensor:
    """Return minus the mean score, 0-d: descending the loss ascends the reward."""
    return -scores_B.mean()


def score(
    rewards: RewardMix,
    video_BCTHW: torch.Tensor,
    prompts: list[str],
    info: dict | None = None,
    words: list[str] | None = None,
    strength: float = 0.0,
    penalty: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the scores (B,) to maximise, and each reward's raw score (B,) by name.

    Args:
        info: what rewards are told besides video and prompts.
        words: [positive, negative], put before each prompt. The score is then (1 + strength)
            R(positive) - R(negative) (semantic relative preference, arXiv 2509.06942, eq. 8 and 9,
            weighted as in its published code), and the raw scores are those of the positive words.
            None scores the prompts as they are.
        penalty: whether to score the opposite: -R, or the words exchanged.
    """
    info = info or {}
    if words is None:
        scores_B, breakdown = rewards(video_BCTHW, prompts, **info)
        return -scores_B if penalty else scores_B, breakdown
    liked, disliked = reversed(words) if penalty else words
    liked_B, breakdown = rewards(video_BCTHW, _with_words(liked, prompts), **info)
    disliked_B, _ = rewards(video_BCTHW, _with_words(disliked, prompts), **info)
    return (1 + strength) * liked_B - disliked_B, breakdown


def start_score(
    rewards: RewardMix,
    video_BCTHW: torch.Tensor,
    prompts: list[str],
    info: dict,
    words: list[str] | None = None,
    strength: float = 0.0,
) -> Callable[[], tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Begin to score without gradient; return a function that returns what `score` does.

    Rewards that another process serves compute until it is called.
    """
    asked = [prompts] if words is None else [_with_words(word, prompts) for word in words]
    waiting = [rewards.start(video_BCTHW, texts, **info) for texts in asked]

    def finish() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        (scores_B, breakdown), *disliked = [wait() for wait in waiting]
        return ((1 + strength) * scores_B - disliked[0][0] if disliked else scores_B), breakdown

    return finish


def _with_words(words: str, prompts: list[str]) -> list[Prompt]:
    """Return the prompts with these words before each; the further fields of their rows stay."""
    return [reworded(prompt, f"{words}. {prompt}") for prompt in prompts]


def score_metrics(names: list[str], scores_SR: torch.Tensor) -> dict[str, float]:
    """Return each column's mean over S samples, and the std of columns named rewards/NAME."""
    means, stds = scores_SR.mean(0).tolist(), scores_SR.std(0, correction=0).tolist()
    metrics = {}
    for name, mean, std in zip(names, means, stds, strict=True):
        metrics |= {name: mean} | ({f"{name}_std": std} if name.startswith("rewards/") else {})
    return metrics
