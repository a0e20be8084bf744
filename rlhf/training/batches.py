"""The prompts and noise of each step, a pure function of seed and place; and its outcome."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from rewards import RewardError
from rlhf.distributed.layout import Layout
from rlhf.method.rollout import draw_noise
from rlhf.prompts import shuffled_indices


@dataclass(frozen=True)
class Batch:
    """The B prompts that a process samples at a time and, by purpose, noise (B, C, T, H, W).

    noise takes another (C, T, H, W) as its second argument.
    """

    prompts: list[str]
    noise: Callable[..., torch.Tensor]


@dataclass(frozen=True)
class BatchResult:
    """The outcome of a batch or of one of its samples; its gradient went to the master weights."""

    columns: dict[str, torch.Tensor]  # (B,) each, by the name that is logged
    suspect: tuple[torch.Tensor, list[str], dict] | None = None  # as in `non_finite_error`
    error: RewardError | None = None  # raised by a reward on this process


def first_failure(results: list[BatchResult]) -> tuple:
    """Return the first suspect and the first error among the results, None for none."""
    suspects, errors = [r.suspect for r in results if r.suspect], [r.error for r in results if r.error]
    return next(iter(suspects), None), next(iter(errors), None)


def finish_in_turn(pending: Iterable[Callable[[], BatchResult]]) -> list[BatchResult]:
    """Call functions that each finish a batch, one batch late; return their results in order.

    pending: taking a function from it begins its batch. A batch is finished only after the next
    one has begun, so that one is sampled while another is scored.
    """
    results, waiting = [], None
    for finish in pending:
        results += [waiting()] if waiting else []
        waiting = finish
    return [*results, waiting()]


class Batches:
    """The batches of a run.

    Args:
        noise_shape_CTHW: latents of one video.
        size: videos of a batch.
        per_step: batches of a process in one optimizer step.
        reuse: optimizer steps that share a rollout. There are then fewer rollouts than steps.
        max_steps: optimizer steps of the run.
        group_size: neighbouring videos of each prompt; divides `size`.
    """

    def __init__(
        self,
        prompts: list[str],
        noise_shape_CTHW: tuple[int, int, int, int],
        layout: Layout,
        seed: int,
        size: int,
        per_step: int = 1,
        reuse: int = 1,
        max_steps: int = 1,
        group_size: int = 1,
    ):
        self.prompts, self.noise_shape, self.layout, self.seed = prompts, noise_shape_CTHW, layout, seed
        self.size, self.reuse, self.max_steps = size, reuse, max_steps
        self.group_size = group_size
        self.samples_per_step = size * per_step * layout.num_processes  # over all processes
        self.origin = 0, 0  # a step, and the samples that the run had taken before it
        self.start = 0, 0  # a rollout, and the place of its first prompt in the run's order

    def batch(self, rollout: int, micro: int) -> Batch:
        """Return this process's batch `micro` of a rollout: prompts and a noise function."""
        start = (micro * self.layout.num_processes + self.layout.process_index) * self.size
        keys = [(rollout, start + i) for i in range(self.size)]

        def noise(purpose: str, shape_CTHW: tuple[int, int, int, int] = self.noise_shape) -> torch.Tensor:
            return draw_noise(shape_CTHW, self.seed, purpose, keys).to(self.layout.device)

        prompts = self.prompts_at((self._place(rollout) + start) // self.group_size, self.size // self.group_size)
        return Batch([prompt for prompt in prompts for _ in range(self.group_size)], noise)

    def state(self, step: int) -> dict:
        """Return the position in the order of samples after `step` steps, for a checkpoint."""
        place = self._place(step // self.reuse)
        processes = self.layout.accelerator.num_processes
        return {"samples": self.samples_before(step), "place": place, "processes": processes}

    def restore(self, step: int, saved: dict) -> None:
        """Set the position in the order of samples to that of a checkpoint after `step` steps.

        saved: its `state`, of any number of processes. {} counts from the step at today's size.
        """
        rollout = step // self.reuse
        self.origin = step, saved.get("samples", self.samples_before(step))
        self.start = rollout, saved.get("place", self.samples_before(rollout))

    def samples_before(self, step: int) -> int:
        """Return the number of samples that all processes take before a step."""
        return self.origin[1] + (step - self.origin[0]) * self.samples_per_step

    def epochs_before(self, step: int) -> float:
        """Return how often each prompt was used before a step."""
        return self.samples_before(step) / self.group_size / len(self.prompts)

    def _place(self, rollout: int) -> int:
        """Return the position of a rollout's first sample in the order of samples."""
        return self.start[1] + (rollout - self.start[0]) * self.samples_per_step

    def prompts_from_rollout(self, rollout: int) -> list[str]:
        """Return the prompts of all rollouts from this one on, to the end of the run.

        They are cut off after two epochs, which hold each prompt in the order of its first use.
        """
        count = (self.max_steps - rollout) * self.samples_per_step // self.group_size
        return self.prompts_at(self._place(rollout) // self.group_size, min(count, 2 * len(self.prompts)))

    def prompts_at(self, start: int, count: int) -> list[str]:
        """Return the prompts at places start .. start+count-1 of the run's endless order."""
        return [self.prompts[i] for i in shuffled_indices(len(self.prompts), self.seed, start, count)]
