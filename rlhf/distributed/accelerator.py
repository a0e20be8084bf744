"""The process group and threads, by accelerate. The trainer sums gradients; no model is wrapped."""

import math
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.device import describe, keep_freed_memory, pick_device
from rlhf.distributed.launch import LAUNCHER_MARK, RESTART_COUNT, end_with_launcher, launch_notes
from rlhf.distributed.layout import Layout

CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")
RENDEZVOUS_SCHEME = "restart"  # our own, next to env:// and tcp://


def _rendezvous(url: str, timeout: timedelta, **kwargs):
    """Yield the results of env://; on one host, prefix store keys with the restart count.

    With a fixed port, as `accelerate launch` sets one, torchrun's store outlives a restart and
    still holds the addresses of ended processes. Several hosts share their keys, since each counts
    its own restarts.
    """
    one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    restart = os.environ.get(RESTART_COUNT, "0") if one_host else "any"
    for store, rank, world_size in rendezvous(url.replace(RENDEZVOUS_SCHEME, "env", 1), timeout=timeout, **kwargs):
        yield dist.PrefixStore(f"restart {restart}", store), rank, world_size


register_rendezvous_handler(RENDEZVOUS_SCHEME, _rendezvous)


def make_accelerator(args: RewardGradientConfig) -> Accelerator:
    """Return an accelerator with the settings' process group, device and trackers; no autocast.

    A collective that waits longer than `ddp_timeout` seconds ends its process with an error. The
    process ends with its launcher. Raises ConfigError if other processes do not come.
    """
    end_with_launcher()
    device = pick_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
        if threads := cpu_threads(args.cpu_threads):
            torch.set_num_threads(threads)
    group = InitProcessGroupKwargs(init_method=f"{RENDEZVOUS_SCHEME}://", timeout=timedelta(seconds=args.ddp_timeout))
    folders = ProjectConfiguration(project_dir=args.output_dir, logging_dir=str(Path(args.output_dir) / "trackers"))
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no",
            dynamo_backend="no",  # else accelerate's own choice would switch TF32 on
            log_with=args.report_to or None,
            project_config=folders,
            kwargs_handlers=[group],
        )
    except dist.DistError as error:
        reason = " ".join(str(error).split())[:200]
        got = f"got no connection to the other processes ({reason})"
        cure = "start all with `accelerate launch` or torchrun, or unset WORLD_SIZE, RANK and LOCAL_RANK"
        place = f"WORLD_SIZE={os.environ.get('WORLD_SIZE')}, RANK={os.environ.get('RANK')}"
        raise ConfigError([f"{place}: {got}, expected them within ddp_timeout={args.ddp_timeout} s; {cure}"]) from error
    assert accelerator.device.type == device.type, (accelerator.device, device)
    return accelerator


def describe_launch(accelerator: Accelerator, precision: str) -> str:
    """Return a run's first line, with processes, device and precision, and the launch's notes."""
    count, device = accelerator.num_processes, accelerator.device
    first = f"{count} process{'es' if count > 1 else ''} on {device.type} ({describe(device)}), {precision}"
    return "\n".join([first, *launch_notes(count)])


def cpu_threads(requested: int | None) -> int | None:
    """Return this process's threads: as requested, else OMP_NUM_THREADS, else its share of cores.

    None leaves PyTorch's own choice, which has obeyed OMP_NUM_THREADS already. `accelerate launch`
    sets OMP_NUM_THREADS=1 where the user set nothing; that is ignored, since it would leave all
    cores but one idle.
    """
    by_launcher = LAUNCHER_MARK in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if requested or ("OMP_NUM_THREADS" in os.environ and not by_launcher):
        return requested
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def available_cores() -> int:
    """Return the cores of this process's affinity, or of its container's quota if that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = CGROUP_LIMIT.read_text().split() if CGROUP_LIMIT.exists() else ("max", "1")
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def local_batches(count: int, size: int, layout: Layout) -> list[list[int]]:
    """Return the indices below `count` of this data rank, in consecutive batches of at most `size`.

    Data ranks have equal shares; the last ones may have less, and fewer batches. Where all ranks
    must keep step (`layout.in_step`), empty batches make up for that.
    """
    share = math.ceil(count / layout.num_processes)
    own = list(range(count))[layout.process_index * share :][:share]
    return [own[i : i + size] for i in range(0, share if layout.in_step else len(own), size)]


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether the flag is set on any process; a collective, with the same answer on all."""
    return bool(accelerator.gather(torch.tensor([flag], device=accelerator.device, dtype=torch.int32)).any())
