"""The frozen base divided over all processes, by FSDP2: a block's weights are gathered while it runs.

PyTorch's `fully_shard` is used directly. accelerate's way to it prepares model and optimizer together and makes all
trained parameters float32 shards of their own; here the adapter stays whole on every process, in the base's format,
with its masters and optimizer outside of the model, and only what is frozen is divided.
"""

from types import MethodType

import torch
import torch.distributed as dist

from rlhf.contentv.blocks import BlockRunner
from rlhf.contentv.shards import Shards


def shard_base(transformer: torch.nn.Module, device: torch.device) -> None:
    """Divide all frozen parameters, block by block, so that one block at a time is whole on the device.

    Afterwards the transformer must not be moved or copied, and all processes have to run it equally often.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # half a second to import

    trained = {p for p in transformer.parameters() if p.requires_grad}
    for p in trained:
        p.data = p.data.to(device)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in transformer.transformer_blocks:
        fully_shard(block, mesh=mesh, ignored_params=trained)
        block.run_by = MethodType(_run_by, block)
        register_fsdp_forward_method(block, "run_by")
    fully_shard(transformer, mesh=mesh, ignored_params=trained)


def _run_by(block, runner, *inputs):
    return runner(block, *inputs)


class ShardedRunner:
    """Runs blocks as another runner does, between the gathering of their weights and their release."""

    def __init__(self, runner: BlockRunner):
        self.runner, self.recompute = runner, runner.recompute

    def over(self, shards: Shards) -> "ShardedRunner":
        """The same runner for tokens that are divided over processes."""
        return ShardedRunner(self.runner.over(shards))

    def __call__(self, block, *inputs):
        return block.run_by(self.runner, *inputs)
