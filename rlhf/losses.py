"""From scores to the loss whose gradient trains the adapter."""

import torch


def reward_loss(scores_B: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss and its metrics: minus the mean score, so that descending the loss ascends the reward."""
    loss = -scores_B.mean()
    return loss, {"loss": loss.item()}
