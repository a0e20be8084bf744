"""From scores to the loss whose gradient trains the adapter."""

import torch

from rewards import RewardMix


def reward_loss(scores_B: torch.Tensor) -> torch.Tensor:
    """Minus the mean score, 0-d, so that descending the loss ascends the reward."""
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
    """(B,) scores to ascend, and the raw score of each reward: for the prompts as they are, or relative to words.

    info: what rewards are told besides. words: [positive, negative], put before each prompt; the score is then
    (1 + strength) R(positive) - R(negative) (semantic relative preference, arXiv 2509.06942, eq. 8 and 9, with the
    weight of its published code), and the raw scores are those for the positive words. penalty: the opposite, minus R,
    or the two words exchanged.
    """
    info = info or {}
    if words is None:
        scores_B, breakdown = rewards(video_BCTHW, prompts, **info)
        return -scores_B if penalty else scores_B, breakdown
    liked, disliked = reversed(words) if penalty else words
    liked_B, breakdown = rewards(video_BCTHW, [f"{liked}. {prompt}" for prompt in prompts], **info)
    disliked_B, _ = rewards(video_BCTHW, [f"{disliked}. {prompt}" for prompt in prompts], **info)
    return (1 + strength) * liked_B - disliked_B, breakdown


def score_metrics(names: list[str], scores_SR: torch.Tensor) -> dict[str, float]:
    """The mean of each of R named columns over S samples; of single rewards (rewards/NAME) the spread, too."""
    means, stds = scores_SR.mean(0).tolist(), scores_SR.std(0, correction=0).tolist()
    metrics = {}
    for name, mean, std in zip(names, means, stds, strict=True):
        metrics |= {name: mean} | ({f"{name}_std": std} if name.startswith("rewards/") else {})
    return metrics
