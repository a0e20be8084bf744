"""Several rewards as one: a weighted sum, each reward seeing only the frames it asked for."""

from collections.abc import Callable

import torch

from rewards.base import RewardError, at_least_float32, check_scores, frames_needed, reward_attribute


class RewardMix:
    """Weighted sum of rewards, and each one's raw score.

    With normalise, a reward that states `mean` and `std` enters as (score - mean) / std, so that weights compare
    typical spreads; one that states neither enters as it is. A weight of 0 keeps a reward in the breakdown, without
    gradient.
    """

    def __init__(self, rewards: dict[str, Callable], weights: list[float] | None = None, normalise: bool = True):
        weights = [1.0] * len(rewards) if weights is None else list(weights)
        if not rewards or len(weights) != len(rewards):
            raise ValueError(
                f"reward_weights: got {len(weights)} weights for {len(rewards)} rewards "
                f"({', '.join(rewards) or 'none'}); expected at least one reward and one weight for each. "
                "Give reward_weights as many entries as reward_funcs."
            )
        self.rewards, self.weights, self.normalise = dict(rewards), dict(zip(rewards, weights, strict=True)), normalise
        self.frames = _most_frames(self.rewards.values())

    def to(self, device) -> "RewardMix":
        """Move those rewards that are modules; others follow the device of the video."""
        for reward in self.rewards.values():
            if isinstance(reward, torch.nn.Module):
                reward.to(device)
        return self

    def __call__(
        self, video_BCTHW: torch.Tensor, prompts: list[str], **info
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(B,) float32 total and, by name, each reward's raw score (B,) float32, detached.

        `info` goes to every reward as it is. Raises RewardError, naming reward and prompt, for scores that are not
        finite or of the wrong shape.
        """
        total_B, breakdown = torch.zeros(len(prompts), device=video_BCTHW.device), {}
        for name, reward in self.rewards.items():
            scores_B = self._score(name, reward, video_BCTHW, prompts, info)
            breakdown[name] = scores_B.detach()
            if self.weights[name] != 0:
                total_B = total_B + self.weights[name] * self._normalised(reward, scores_B)
        return total_B, breakdown

    def _score(self, name, reward, video_BCTHW, prompts, info) -> torch.Tensor:
        with_gradient = torch.is_grad_enabled() and self.weights[name] != 0
        if with_gradient and video_BCTHW.requires_grad and not reward_attribute(reward, "differentiable"):
            expected = "a reward with a gradient, for training"
            cure = "move it to eval_reward_funcs, or give it the weight 0 to log it only"
            raise RewardError(name, got="differentiable=False", expected=expected, cure=cure)
        frames = frames_needed(reward, video_BCTHW.shape[2])
        with torch.set_grad_enabled(with_gradient):
            scores_B = reward(video_BCTHW[:, :, :frames], prompts, **info)
        check_scores(name, scores_B, prompts)
        return at_least_float32(scores_B)

    def _normalised(self, reward, scores_B) -> torch.Tensor:
        mean, std = reward_attribute(reward, "mean"), reward_attribute(reward, "std")
        return (scores_B - (mean or 0.0)) / std if self.normalise and std is not None else scores_B


def _most_frames(rewards) -> str | int:
    asked = [reward_attribute(reward, "frames") for reward in rewards]
    return "all" if "all" in asked else max(1 if frames == "first" else frames for frames in asked)
