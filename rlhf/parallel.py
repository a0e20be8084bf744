"""Processes and their threads, through accelerate. The model is not wrapped: gradients are summed by the trainer."""

import math
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from rlhf.config import RewardGradientConfig
from rlhf.device import keep_freed_memory, pick_device
from rlhf.layout import RESTARTS, Layout
from rlhf.lifeline import Lifeline

LAUNCHER_MARK = "ACCELERATE_MIXED_PRECISION"  # set by `accelerate launch` for every process it starts
CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")
START = "start"  # a scheme of our own, beside env:// and tcp://
LAST_RESORT = 10  # PyTorch's own timeout, in units of ours, which spares those who wait for one that goes on


def _meet(url: str, timeout: timedelta, **kwargs):
    """As env://, on one host with keys of this start alone.

    Where torchrun is told a port, as by `accelerate launch`, its store outlives a restart, and with it the addresses of
    processes that have ended. Several hosts may count their restarts differently.
    """
    one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    start = os.environ.get(RESTARTS, "0") if one_host else "any"
    for store, rank, processes in rendezvous(url.replace(START, "env", 1), timeout=timeout, **kwargs):
        yield dist.PrefixStore(f"start {start}", store), rank, processes


register_rendezvous_handler(START, _meet)


class WatchedAccelerator(Accelerator):
    """An accelerator whose processes notice when one of them is lost."""

    def __init__(self, patience: float, **kwargs):
        limit = timedelta(seconds=LAST_RESORT * patience)
        group = InitProcessGroupKwargs(init_method=f"{START}://", timeout=limit)
        super().__init__(kwargs_handlers=[group], **kwargs)
        # A store of its own connection: a wait of the main thread would keep the beats back.
        store = dist.distributed_c10d._get_default_store().clone() if self.num_processes > 1 else None
        self.lifeline = Lifeline(self.process_index, self.num_processes, patience, store)

    def gather(self, tensor):
        with self.lifeline.waiting():
            return super().gather(tensor)

    def reduce(self, tensor, reduction="mean", scale=1.0):
        with self.lifeline.waiting():
            return super().reduce(tensor, reduction, scale)

    def wait_for_everyone(self):
        with self.lifeline.waiting():
            super().wait_for_everyone()

    def end_training(self):
        self.lifeline.end()
        super().end_training()


def make_accelerator(args: RewardGradientConfig) -> WatchedAccelerator:
    """The process group, the device and the trackers that args name. Formats are our own business: no autocast."""
    device = pick_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
        if threads := cpu_threads(args.cpu_threads):
            torch.set_num_threads(threads)
    folders = ProjectConfiguration(project_dir=args.output_dir, logging_dir=str(Path(args.output_dir) / "trackers"))
    accelerator = WatchedAccelerator(
        args.ddp_timeout,
        cpu=device.type == "cpu",
        mixed_precision="no",
        log_with=args.report_to or None,
        project_config=folders,
    )
    assert accelerator.device.type == device.type, (accelerator.device, device)
    return accelerator


def cpu_threads(asked: int | None) -> int | None:
    """Threads of a process: what was asked; else OMP_NUM_THREADS (None: it is obeyed already); else its share of cores.

    `accelerate launch` sets OMP_NUM_THREADS=1 where the user set nothing, which would leave all cores but one idle.
    """
    by_launcher = LAUNCHER_MARK in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if asked or ("OMP_NUM_THREADS" in os.environ and not by_launcher):
        return asked
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def available_cores() -> int:
    """Cores that this process may use: its affinity, and a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = CGROUP_LIMIT.read_text().split() if CGROUP_LIMIT.exists() else ("max", "1")
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def own_batches(count: int, size: int, layout: Layout) -> list[list[int]]:
    """Which of `count` pieces of work are this process's, at most `size` at a time: neighbours, an equal share.

    Who has less than others has fewer batches; empty ones in their place where all have to keep step.
    """
    share = math.ceil(count / layout.num_processes)
    own = list(range(count))[layout.process_index * share :][:share]
    return [own[i : i + size] for i in range(0, share if layout.in_step else len(own), size)]


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set on any process; all processes get the same answer."""
    return bool(accelerator.gather(torch.tensor([flag], device=accelerator.device, dtype=torch.int32)).any())
