"""The division of a run's processes: data x guidance x sequence, and which of them work together.

Processes of one data rank hold the same model and work on the same videos. They run two guidance
branches, and within a branch parts of a video's tokens. Neighbours share tokens, which takes most
communication; the next ones share branches.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.distributed.launch import launcher_world_size
from rlhf.execution.collectives import Group, average_grad


@dataclass(frozen=True)
class Sizes:
    """A layout as three numbers, whose product is the number of processes."""

    data: int
    guidance: int = 1
    sequence: int = 1

    @classmethod
    def from_settings(cls, args: RewardGradientConfig, processes: int) -> "Sizes":
        """Return the layout of the settings; raise ValueError if it does not fit the processes."""
        together = args.guidance_parallel * args.sequence_parallel
        if processes % together:
            fitting = [(g, s) for g in (1, 2) for s in range(1, processes + 1) if processes % (g * s) == 0]
            named = ", ".join(f"{g} x {s}" for g, s in fitting)
            raise ValueError(
                f"guidance_parallel={args.guidance_parallel} x sequence_parallel={args.sequence_parallel} are "
                f"{together} processes, which do not divide the {processes} of this run; use one of {named}, or start "
                f"{-(-processes // together) * together} processes"
            )
        return cls(processes // together, args.guidance_parallel, args.sequence_parallel)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """Return the data, guidance and sequence rank of a process."""
        rank, sequence = divmod(rank, self.sequence)
        return *divmod(rank, self.guidance), sequence

    def __str__(self) -> str:
        return f"data {self.data} x guidance {self.guidance} x sequence {self.sequence}"


def planned_processes(args: RewardGradientConfig, asked: int | None = None) -> int:
    """Return the processes of a dry run: as asked or started; if one, the fewest that work."""
    count = asked or launcher_world_size()
    return count if count > 1 else max(args.guidance_parallel * args.sequence_parallel, 1 + args.shard_base)


class Layout:
    """The run's processes, one for each data rank, as components see them that share out videos.

    In place of an `accelerate.Accelerator` it has the number of data ranks as num_processes, and
    this process's as process_index. `reduce` and `gather` count each data rank once.
    """

    def __init__(self, args: RewardGradientConfig, accelerator):
        self.accelerator, self.device = accelerator, accelerator.device
        self.sizes = Sizes.from_settings(args, accelerator.num_processes)
        self.num_processes = self.sizes.data
        self.process_index, *self._place = self.sizes.coordinates(accelerator.process_index)
        self.is_main_process, self.wait_for_everyone = accelerator.is_main_process, accelerator.wait_for_everyone
        self.in_step = args.shard_base  # all run the transformer equally often: each holds a part
        # Processes that share a velocity's branches, a branch's tokens, or either; None if alone.
        sizes = self.sizes
        ranks = torch.arange(accelerator.num_processes).view(sizes.data, sizes.guidance, sizes.sequence)
        guidance, sequence = _own_group(ranks.transpose(1, 2)), _own_group(ranks)
        self.guidance_group, self.sequence_group = guidance, sequence
        self.model_group = _own_group(ranks.flatten(1)) if guidance and sequence else guidance or sequence

    def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        """Return the sum of a tensor over data ranks, on every process; how is always "sum"."""
        return self.accelerator.reduce(torch.zeros_like(tensor) if any(self._place) else tensor, how)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all data ranks, joined along dimension 0, on every process."""
        every = self.accelerator.gather(tensor)
        return every.unflatten(0, (-1, len(tensor)))[:: self.sizes.guidance * self.sizes.sequence].flatten(0, 1)

    def require_same(self, **things) -> None:
        """Raise ConfigError, on every process, if a named value differs between processes."""
        names = list(things)
        digests = [int.from_bytes(hashlib.sha256(repr(things[n]).encode()).digest()[:7]) for n in names]
        every = self.accelerator.gather(torch.tensor([digests], device=self.device)).cpu()
        wrong = [
            f"{name}: got others on process {rank} than on process 0, expected the same on all; start all with the "
            "same settings and files"
            for rank, row in enumerate(every != every[0])
            for name in (names[i] for i in row.nonzero().flatten().tolist())
        ]
        if wrong:
            raise ConfigError(wrong)

    def average_grad(self, latents_BCTHW: torch.Tensor) -> torch.Tensor:
        """Return the latents; their gradient is averaged over the data rank's processes."""
        return latents_BCTHW if self.model_group is None else average_grad(latents_BCTHW, self.model_group)


def _own_group(ranks: torch.Tensor) -> Group | None:
    """Create a group for each row of ranks (..., size); return this process's, None for size 1."""
    rows = ranks.flatten(0, -2).tolist()
    return dist.new_subgroups_by_enumeration(rows)[0] if len(rows[0]) > 1 else None
