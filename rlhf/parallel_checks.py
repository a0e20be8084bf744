"""What the settings about several processes ask of the others."""

from collections.abc import Iterator

from rlhf.config import RewardGradientConfig
from rlhf.layout import Sizes, planned_processes, started_processes


def parallel_problems(args: RewardGradientConfig) -> Iterator[str]:
    """args has all sampling keys set."""
    processes = started_processes()
    if args.guidance_parallel not in (1, 2):
        yield f"guidance_parallel: got {args.guidance_parallel}, expected 1 or 2: guidance has two branches; correct it"
    elif args.sequence_parallel < 1:
        yield f"sequence_parallel: got {args.sequence_parallel}, expected at least 1; raise it"
    else:
        yield from _fitting(args, planned_processes(args, args.plan_processes) if args.dry_run else processes)
    if args.ddp_timeout < 1:
        yield f"ddp_timeout: got {args.ddp_timeout}, expected at least 1 second; raise it"
    if args.guidance_parallel == 2:
        yield from _branches(args)
    if args.shard_base:
        yield from _sharded(args, processes)


def _fitting(args, processes):
    try:
        Sizes.of(args, processes)
    except ValueError as error:
        yield str(error)


def _branches(args):
    needed = {"guidance_gradient": "full", "guidance_together": False, "guidance_every": 1}
    for name, value in needed.items():
        if (got := getattr(args, name)) != value:
            yield f"{name}: got {got} with guidance_parallel 2, expected {value}: both branches are run; change one"
    if args.guidance_scale <= 1:
        yield f"guidance_parallel: got 2 with guidance_scale {args.guidance_scale}, which has one branch; set it to 1"


def _sharded(args, processes):
    for name, plain in (("stream_weights", False), ("base_bits", None), ("sampling_weights", "own")):
        if (got := getattr(args, name)) != plain:
            yield f"shard_base: got {name}={got}, expected {plain}: it needs whole weights; leave one out"
    if processes == 1 and not args.dry_run:
        yield "shard_base: got one process, expected at least 2 to divide the base over; start more, or stream_weights"
