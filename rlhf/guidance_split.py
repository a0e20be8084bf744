"""The two branches of guidance on two processes: each runs one, and they exchange velocities."""

from collections.abc import Callable

import torch.distributed as dist

from rlhf.contentv.flow import guided_velocity
from rlhf.exchange import Group, entering, gathered
from rlhf.sampler import Velocity
from rlhf.types import Conditioning


def split_velocity(transformer: Callable, cond: Conditioning, guidance_scale: float, group: Group) -> Velocity:
    """The guided velocity v_neg + g (v_text - v_neg), of which the group's first process runs v_text, the second v_neg.

    Gradients are exact: the adapter receives that of the own branch, the latents the sum of both branches'.
    """
    if dist.get_rank(group) == 1:
        cond = cond.negative

    def velocity(x, sigma):
        v_text, v_neg = gathered(guided_velocity(transformer, entering(x, group), sigma, cond, 1.0), group)
        return v_neg + guidance_scale * (v_text - v_neg)

    return velocity
