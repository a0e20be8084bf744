"""Check the settings of several processes against the others."""

from collections.abc import Iterator

from rlhf.checks.rewards import problems_raised_by
from rlhf.config import RewardGradientConfig
from rlhf.distributed.launch import launch_problems, launcher_world_size
from rlhf.distributed.layout import Sizes


def parallel_problems(args: RewardGradientConfig, processes: int | None = None) -> Iterator[str]:
    """Yield problems of the launch, and of parallel settings with the number of processes.

    processes: None for those that were started.
    """
    yield from launch_problems()
    processes = processes or launcher_world_size()
    if args.sequence_parallel >= 1:
        yield from problems_raised_by(Sizes.from_settings, args, processes)
    if args.guidance_parallel == 2:
        yield from _guidance_problems(args)
    if args.shard_base:
        yield from _shard_problems(args, processes)


def _guidance_problems(args) -> Iterator[str]:
    """Yield settings that conflict with guidance_parallel=2."""
    needed = {"guidance_gradient": "full", "guidance_together": False}
    for name, value in needed.items():
        if (got := getattr(args, name)) != value:
            yield f"{name}: got {got} with guidance_parallel 2, expected {value}: both branches are run; change one"
    if args.guidance_scale <= 1:
        yield f"guidance_parallel: got 2 with guidance_scale {args.guidance_scale}, which has one branch; set it to 1"


def _shard_problems(args, processes: int) -> Iterator[str]:
    """Yield settings that conflict with shard_base, and a launch of a single process."""
    for name, plain in (("stream_weights", False), ("base_bits", None)):
        if (got := getattr(args, name)) != plain:
            yield f"shard_base: got {name}={got}, expected {plain}: it needs whole weights; leave one out"
    if processes == 1:
        yield "shard_base: got one process, expected at least 2 to divide the base over; start more, or stream_weights"
