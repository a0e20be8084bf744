"""Which prompts and which noise belong to a step: a pure function of seed and place, on any number of processes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlhf.config import RewardGradientConfig
from rlhf.layout import Layout
from rlhf.prompts import prompt_positions
from rlhf.sampler import draw_noise

# Settings that may differ between the hosts of a run.
OF_A_HOST = ("model", "device", "cpu_threads", "prompts", "eval_prompts", "base_dir", "output_dir")


@dataclass(frozen=True)
class Batch:
    """What one process samples at a time: B prompts and, by purpose, their noise (B, C, T, H, W)."""

    prompts: list[str]
    noise: Callable[[str], torch.Tensor]


class Batches:
    """The batches of a run."""

    def __init__(
        self, args: RewardGradientConfig, layout: Layout, prompts: list[str], noise_shape_CTHW: tuple, fps: int
    ):
        self.args, self.layout, self.prompts, self.fps = args, layout, prompts, fps
        self.noise_shape = noise_shape_CTHW
        layout.require_same(prompts=prompts, settings=[v for k, v in vars(args).items() if k not in OF_A_HOST])
        self.size, self.processes = args.per_device_train_batch_size, layout.num_processes
        self.origin = 0, 0  # a step, and how many samples the run had taken before it
        self.start = 0, 0  # a rollout - with `rollout_reuse` there are fewer than steps - and where its prompts stand
        self.samples_per_step = self.size * args.gradient_accumulation_steps * self.processes  # over all processes

    def batch(self, step: int, micro: int) -> Batch:
        """This process's batch number `micro` of a step. A sample's noise has the key (step, place in the step).

        Where steps share rollouts (`rollout_reuse`), step is the number of the rollout, here and in `from_step`.
        """
        start = (micro * self.processes + self.layout.process_index) * self.size
        keys = [(step, start + i) for i in range(self.size)]

        def noise(purpose: str) -> torch.Tensor:
            return draw_noise(self.noise_shape, self.args.seed, purpose, keys).to(self.layout.device)

        return Batch(self.prompts_at(self._place(step) + start, self.size), noise)

    def state(self, step: int) -> dict:
        """What a checkpoint after `step` steps keeps of the order of samples."""
        place = self._place(step // self.args.rollout_reuse)
        processes = self.layout.accelerator.num_processes
        return {"samples": self.samples_before(step), "place": place, "processes": processes}

    def go_on_from(self, step: int, saved: dict) -> None:
        """Count from a step of which `state` was saved, as far as there is one: by any number of processes."""
        rollout = step // self.args.rollout_reuse
        self.origin = step, saved.get("samples", self.samples_before(step))
        self.start = rollout, saved.get("place", self.samples_before(rollout))

    def samples_before(self, step: int) -> int:
        """How many samples the run takes before a step, over all processes."""
        return self.origin[1] + (step - self.origin[0]) * self.samples_per_step

    def _place(self, rollout: int) -> int:
        return self.start[1] + (rollout - self.start[0]) * self.samples_per_step

    def info(self, step: int) -> dict:
        """What rewards are told besides videos and prompts."""
        return {"fps": self.fps, "seed": self.args.seed, "step": step}

    def from_step(self, step: int) -> list[str]:
        """The prompts of all steps from `step` on, to the end of the run."""
        return self.prompts_at(self._place(step), (self.args.max_steps - step) * self.samples_per_step)

    def prompts_at(self, start: int, count: int) -> list[str]:
        """The prompts at places start .. start+count-1 of the run's endless order."""
        return [self.prompts[i] for i in prompt_positions(len(self.prompts), self.args.seed, start, count)]
