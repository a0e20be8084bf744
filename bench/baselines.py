"""Baselines without a gradient of the reward that are no method of the project: DDPO, best of n.

Flow-GRPO and DiffusionNFT are methods of their own, `flow_grpo` and `nft`.

Shape legend: B batch, T frames, H height, W width.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from rlhf.method.flow_grpo import FlowGRPO
from rlhf.method.options import FlowGRPOOptions
from rlhf.method.plan import Plan
from rlhf.trainer import RewardGradientTrainer
from rlhf.training.batches import BatchResult


class DDPOTrainer(RewardGradientTrainer):
    """DDPO (arXiv 2305.13301) for flows, with one update a rollout, on one process.

    It is `flow_grpo`, but all videos of a batch are compared with each other, each of another
    prompt: DDPO's rule for prompts that it has not seen 16 times. Here none is seen so often.

    Args:
        options: of flow_grpo; their group_size is not read.
        args: the settings, with a method whose batches have no groups.
    """

    def __init__(self, options: FlowGRPOOptions, args, **inputs):
        super().__init__(args=args, **inputs)
        self.scorer = replace(self.scorer, method="flow_grpo")  # scores alone are asked for
        noise = options.noise, options.noise_level, options.kl_weight, options.advantage_clip
        self.regression = FlowGRPO(self.batches.size, *noise)

    def _gradient(self, step: int, plan: Plan) -> tuple[list[BatchResult], float]:
        return super()._gradient(step, Plan(plan.sigmas, [], regression=self.regression))


@torch.no_grad()
def best_of(
    count: int,
    make: Callable[[int], torch.Tensor],
    reward: Callable[[torch.Tensor], torch.Tensor],
    report_at: list[int],
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (n, the best videos of the first n samples) for each n of report_at.

    make: number of the sample -> videos (B, 3, T, H, W); reward: videos -> scores (B,), by which
    the best is kept.
    """
    for number in range(count):
        video = make(number)
        scores_B = reward(video)
        if number == 0:
            best, best_B = video, scores_B
        better_B = scores_B > best_B
        best = torch.where(better_B.view(-1, 1, 1, 1, 1), video, best)
        best_B = torch.where(better_B, scores_B, best_B)
        if number + 1 in report_at:
            yield number + 1, best
