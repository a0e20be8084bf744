"""A reward on another device than the videos: `device` among its arguments."""

from collections.abc import Callable
from typing import Any

import torch

from rewards.contract import RewardError, call_reward
from rlhf.device import pick_device


class OnDevice:
    """A reward that runs on a device of its own; its attributes are those of the reward.

    The gradient of its scores crosses back to the device of the video. Raises RewardError for a
    device that is not there.
    """

    def __init__(self, name: str, reward: Callable, device: str):
        self.reward, self.place = reward, reward_device(name, device)
        if isinstance(reward, torch.nn.Module):
            reward.to(self.place).requires_grad_(False).eval()

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the reward."""
        return getattr(self.reward, name)

    def __call__(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> Any:
        """Return scores (B,) on the device of the video; what is no tensor stays as it is."""
        info = {name: x.to(self.place) if isinstance(x, torch.Tensor) else x for name, x in info.items()}
        scores_B = call_reward(self.reward, video_BCTHW.to(self.place), prompts, info)
        return scores_B.to(video_BCTHW.device) if isinstance(scores_B, torch.Tensor) else scores_B


def reward_device(name: str, device: Any) -> torch.device:
    """Return the device of this name, such as "cuda:1". Raises RewardError if it is not there."""
    try:
        return pick_device(device if isinstance(device, str) else str(device))
    except (ValueError, RuntimeError) as error:
        cure = "correct the reward's `device`, or leave it out"
        raise RewardError(name, got=str(error), expected="a device of this machine", cure=cure) from error


def without_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a reward's arguments without `device`, on which its scores do not depend."""
    return {name: value for name, value in kwargs.items() if name != "device"}
