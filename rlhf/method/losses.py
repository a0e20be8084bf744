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
    perturbation: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the scores (B,) to maximise, and each reward's raw score (B,) by name.

    Args:
        info: what rewards are told besides video and prompts.
        words: [positive, negative], put before each prompt. The score is then (1 + strength)
            R(positive) - R(negative) (semantic relative preference, arXiv 2509.06942, eq. 8 and 9,
            weighted as in its published code), and the raw scores are those of the positive words.
            None scores the prompts as they are.
        penalty: whether to score the opposite: -R, or the words exchanged.
        perturbation: length, as in `perturb`, of the step to where the gradient is taken; 0: at
            the video itself. The values of the scores are those of the video in any case.
    """
    info = info or {}

    def objective(video_BCTHW: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if words is None:
            scores_B, breakdown = rewards(video_BCTHW, prompts, **info)
            return -scores_B if penalty else scores_B, breakdown
        liked, disliked = reversed(words) if penalty else words
        liked_B, breakdown = rewards(video_BCTHW, _with_words(liked, prompts), **info)
        disliked_B, _ = rewards(video_BCTHW, _with_words(disliked, prompts), **info)
        return (1 + strength) * liked_B - disliked_B, breakdown

    if not perturbation:
        return objective(video_BCTHW)
    moved_BCTHW, scores_B, breakdown = perturb(objective, video_BCTHW, perturbation)
    robust_B, _ = objective(moved_BCTHW)
    return scores_B + (robust_B - robust_B.detach()), breakdown


def perturb(
    objective: Callable, video_BCTHW: torch.Tensor, length: float
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Move each video a step against its score; return it, and scores and breakdown before.

    The step goes along the score's gradient at the pixels (RSA-FT, arXiv 2603.21175), and is held
    constant: the moved video has the gradient of the video.

    Args:
        objective: video -> scores (B,) and a breakdown.
        length: root mean square of the change over a video's values, which stay in [0, 1].
    """
    pixels_BCTHW = video_BCTHW.detach().requires_grad_()
    scores_B, breakdown = objective(pixels_BCTHW)
    (grad_BCTHW,) = torch.autograd.grad(scores_B.sum(), pixels_BCTHW)
    size_B = grad_BCTHW.square().mean((1, 2, 3, 4), keepdim=True).sqrt()
    step_BCTHW = grad_BCTHW * (length / torch.where(size_B > 0, size_B, 1.0))
    moved_BCTHW = (pixels_BCTHW - step_BCTHW).clamp(0, 1).detach()
    return video_BCTHW + (moved_BCTHW - video_BCTHW.detach()), scores_B.detach(), breakdown


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
