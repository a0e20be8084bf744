"""How the processes of a run are divided: data x guidance x sequence, and who belongs together.

Processes of one data rank hold the same model and work on the same videos: two guidance branches, and within a branch
the parts of a video's tokens. Neighbours share tokens, since these exchange most; the next ones share branches.
"""

import hashlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.execution.collectives import Group, average_grad

RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"  # set by torchrun, and so by `accelerate launch`


@dataclass(frozen=True)
class Sizes:
    """A layout as three numbers, whose product is the number of processes."""

    data: int
    guidance: int = 1
    sequence: int = 1

    @classmethod
    def of(cls, args: RewardGradientConfig, processes: int) -> "Sizes":
        """Raises ValueError, naming layouts that work, where the settings do not fit the number of processes."""
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

    def place(self, rank: int) -> tuple[int, int, int]:
        """(data, guidance, sequence) ranks of a process."""
        rank, sequence = divmod(rank, self.sequence)
        return *divmod(rank, self.guidance), sequence

    def __str__(self) -> str:
        return f"data {self.data} x guidance {self.guidance} x sequence {self.sequence}"


def started_processes() -> int:
    """How many processes this run has, as its launcher says, before any of them knows another."""
    return int(os.environ.get("WORLD_SIZE", 1))


def planned_processes(args: RewardGradientConfig, asked: int | None = None) -> int:
    """Return how many processes a dry run plans for: those asked for or started; the fewest that work, if one."""
    count = asked or started_processes()
    return count if count > 1 else max(args.guidance_parallel * args.sequence_parallel, 1 + args.shard_base)


class Layout:
    """The run's processes as those see them who share out videos: one for each data rank.

    In place of an `accelerate.Accelerator` it has the number of data ranks as num_processes, and this process's as
    process_index; what it sums counts each data rank once.
    """

    def __init__(self, args: RewardGradientConfig, accelerator):
        self.accelerator, self.device = accelerator, accelerator.device
        self.sizes = Sizes.of(args, accelerator.num_processes)
        self.num_processes = self.sizes.data
        self.process_index, *self._place = self.sizes.place(accelerator.process_index)
        self.is_main_process, self.wait_for_everyone = accelerator.is_main_process, accelerator.wait_for_everyone
        # Every process runs the transformer as often as any other, since all of them hold a part of its weights.
        self.in_step = args.shard_base
        self.guidance_group, self.sequence_group, self.model_group = self._groups()

    def _groups(self) -> tuple[Group | None, Group | None, Group | None]:
        """Of those that share a velocity's branches, a branch's tokens, or either; None for a single process."""
        sizes = self.sizes
        ranks = torch.arange(self.accelerator.num_processes).view(sizes.data, sizes.guidance, sizes.sequence)
        guidance, sequence = _own_group(ranks.transpose(1, 2)), _own_group(ranks)
        both = _own_group(ranks.flatten(1)) if guidance and sequence else guidance or sequence
        return guidance, sequence, both

    def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        """The sum over data ranks, on every process. how: "sum", as an accelerator takes it."""
        return self.accelerator.reduce(torch.zeros_like(tensor) if any(self._place) else tensor, how)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all data ranks, one after the other along the first dimension, on every process."""
        every = self.accelerator.gather(tensor)
        return every.unflatten(0, (-1, len(tensor)))[:: self.sizes.guidance * self.sizes.sequence].flatten(0, 1)

    def watch(self, transformer: torch.nn.Module) -> None:
        """Take each of its calls as a sign that this process goes on."""
        if self.accelerator.num_processes > 1:
            tick = self.accelerator.lifeline.tick
            transformer.register_forward_pre_hook(lambda *_: tick())  # a function, so that copies of the model share it

    def require_same(self, **things) -> None:
        """Raise ConfigError, on every process, where one of them has another thing of that name."""
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
        """Latents of which all processes of a data rank hold a copy, before each decodes and scores them by itself."""
        return latents_BCTHW if self.model_group is None else average_grad(latents_BCTHW, self.model_group)


def _own_group(ranks: torch.Tensor) -> Group | None:
    """The group of those that stand in one row, (..., size), with this process; None for rows of one."""
    rows = ranks.flatten(0, -2).tolist()
    return dist.new_subgroups_by_enumeration(rows)[0] if len(rows[0]) > 1 else None
