import torch

from rlhf.losses import reward_loss


def test_descending_the_loss_ascends_the_mean_score():
    scores = torch.tensor([1.0, 4.0], requires_grad=True)
    loss, metrics = reward_loss(scores)
    loss.backward()
    assert loss.item() == metrics["loss"] == -2.5
    assert scores.grad.tolist() == [-0.5, -0.5]
