"""FSDP2 for the frozen base: weights are sharded over all ranks and gathered block by block.

PyTorch's `fully_shard` is called directly, for only frozen weights are sharded. Through accelerate,
FSDP prepares model and optimizer together and shards all trained parameters in float32. Here every
rank holds the whole adapter in the base's number format, and its masters and optimizer are outside
of the model.
"""

from types import MethodType

import torch
import torch.distributed as dist

from rlhf.execution.blocks import BlockRunner
from rlhf.execution.ulysses import SequenceShards


def shard_base(transformer: torch.nn.Module, device: torch.device) -> None:
    """Shard all frozen parameters over the ranks; one block at a time is whole on the device.

    Afterwards the transformer must not be moved or copied, and all ranks must run it equally often.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # half a second to import

    trained = {p for p in transformer.parameters() if p.requires_grad}
    for p in trained:
        p.data = p.data.to(device)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in transformer.transformer_blocks:
        fully_shard(block, mesh=mesh, ignored_params=trained)
        block.run_by = MethodType(lambda block, runner, *inputs: runner(block, *inputs), block)
        register_fsdp_forward_method(block, "run_by")
    fully_shard(transformer, mesh=mesh, ignored_params=trained)


class ShardedRunner:
    """A block runner that gathers a block's weights before the run and frees them afterwards."""

    def __init__(self, runner: BlockRunner):
        self.runner, self.recompute = runner, runner.recompute

    def with_shards(self, shards: SequenceShards) -> "ShardedRunner":
        """Return this runner for tokens that are divided over ranks."""
        return ShardedRunner(self.runner.with_shards(shards))

    def __call__(self, block, *inputs):
        """Run a block by a method of its own, around which FSDP gathers its weights."""
        return block.run_by(self.runner, *inputs)
