"""The layout of a run's processes: data x guidance x sequence ranks, and their process groups.

The processes of one data rank hold the same model and work on the same videos. They divide the two
guidance branches, and within a branch the video's tokens. Neighbouring ranks share tokens, since
these communicate most; the next ones share branches.
"""

import hashlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.exchange import Group, agreed

RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"  # set by torchrun, and so by `accelerate launch`


@dataclass(frozen=True)
class Sizes:
    """The sizes of a layout, whose product is the world size."""

    data: int
    guidance: int = 1
    sequence: int = 1

    @classmethod
    def of(cls, args: RewardGradientConfig, processes: int) -> "Sizes":
        """Return the layout of the settings; raise ValueError if the world size does not fit it."""
        ranks_per_video = args.guidance_parallel * args.sequence_parallel
        if processes % ranks_per_video:
            fitting = [(g, s) for g in (1, 2) for s in range(1, processes + 1) if processes % (g * s) == 0]
            named = ", ".join(f"{g} x {s}" for g, s in fitting)
            raise ValueError(
                f"guidance_parallel={args.guidance_parallel} x sequence_parallel={args.sequence_parallel} are "
                f"{ranks_per_video} processes, which do not divide the {processes} of this run; use one of {named}, "
                f"or start {-(-processes // ranks_per_video) * ranks_per_video} processes"
            )
        return cls(processes // ranks_per_video, args.guidance_parallel, args.sequence_parallel)

    def place(self, rank: int) -> tuple[int, int, int]:
        """Return the (data, guidance, sequence) ranks of a process."""
        rank, sequence = divmod(rank, self.sequence)
        return *divmod(rank, self.guidance), sequence

    def __str__(self) -> str:
        return f"data {self.data} x guidance {self.guidance} x sequence {self.sequence}"


def started_processes() -> int:
    """Return the world size that the launcher set, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def planned_processes(args: RewardGradientConfig) -> int:
    """Return a dry run's world size: as set or launched; for 1, the least that settings need."""
    asked = args.plan_processes or started_processes()
    return asked if asked > 1 else max(args.guidance_parallel * args.sequence_parallel, 1 + args.shard_base)


class Layout:
    """The data ranks of a run, between which videos are divided, and the groups within a data rank.

    It stands in for an `accelerate.Accelerator`: num_processes is the number of data ranks,
    process_index this process's data rank, and sums count each data rank once.
    """

    def __init__(self, args: RewardGradientConfig, accelerator):
        self.accelerator, self.device = accelerator, accelerator.device
        self.sizes = Sizes.of(args, accelerator.num_processes)
        self.num_processes = self.sizes.data
        self.process_index, *self._place = self.sizes.place(accelerator.process_index)
        self.is_main_process, self.wait_for_everyone = accelerator.is_main_process, accelerator.wait_for_everyone
        # All processes run the transformer equally often, since each holds a part of its weights.
        self.in_step = args.shard_base
        self.guidance_group, self.sequence_group, self.model_group = self._groups()

    def _groups(self) -> tuple[Group | None, Group | None, Group | None]:
        """Return the groups that share guidance branches, tokens, and either; None for no group."""
        sizes = self.sizes
        ranks = torch.arange(self.accelerator.num_processes).view(sizes.data, sizes.guidance, sizes.sequence)
        guidance, sequence = _own_group(ranks.transpose(1, 2)), _own_group(ranks)
        both = _own_group(ranks.flatten(1)) if guidance and sequence else guidance or sequence
        return guidance, sequence, both

    def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        """Return the sum over data ranks, on every process. how: "sum", as accelerate has it."""
        return self.accelerator.reduce(torch.zeros_like(tensor) if any(self._place) else tensor, how)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return all data ranks' tensors, concatenated along dimension 0, on every process."""
        every = self.accelerator.gather(tensor)
        return every.unflatten(0, (-1, len(tensor)))[:: self.sizes.guidance * self.sizes.sequence].flatten(0, 1)

    def require_same(self, **values) -> None:
        """Raise ConfigError on every process if a named value differs between processes."""
        names = list(values)
        digests = [int.from_bytes(hashlib.sha256(repr(values[n]).encode()).digest()[:7]) for n in names]
        every = self.accelerator.gather(torch.tensor([digests], device=self.device)).cpu()
        wrong = [
            f"{name}: got others on process {rank} than on process 0, expected the same on all; start all with the "
            "same settings and files"
            for rank, row in enumerate(every != every[0])
            for name in (names[i] for i in row.nonzero().flatten().tolist())
        ]
        if wrong:
            raise ConfigError(wrong)

    def agreed(self, latents_BCTHW: torch.Tensor) -> torch.Tensor:
        """Return latents that all ranks of a video hold, with the mean of these ranks' gradients."""
        return latents_BCTHW if self.model_group is None else agreed(latents_BCTHW, self.model_group)


def _own_group(ranks: torch.Tensor) -> Group | None:
    """Return the group of this process's row of ranks (..., size); None for rows of one."""
    rows = ranks.flatten(0, -2).tolist()
    return dist.new_subgroups_by_enumeration(rows)[0] if len(rows[0]) > 1 else None
