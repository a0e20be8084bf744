"""Runs that go on by themselves: after a restart by torchrun, or wherever resume_from_checkpoint is "auto"."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from rlhf.checkpoint import find_checkpoint, last_whole, read_state
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.parallel import RESTARTS
from rlhf.run_folder import run_in

FIXED_ON_RESUME = (
    "model",
    "lora_rank",
    "lora_alpha",
    "lora_target_modules",
    "lora_use_dora",
    "lora_rank_pattern",
    "lora_alpha_pattern",
    "train_blocks",
)


def going_on(args: RewardGradientConfig) -> RewardGradientConfig:
    """The settings with "auto" resolved: the latest whole checkpoint, else from the start, over what is there.

    A process that torchrun has started again goes on as with "auto", whatever the settings said for the first time.
    """
    restarted = int(os.environ.get(RESTARTS, 0)) > 0
    if not restarted and args.resume_from_checkpoint != "auto":
        return args
    folder = Path(args.output_dir)
    if last_whole(folder / "checkpoints"):
        return dataclasses.replace(args, resume_from_checkpoint="latest", overwrite_output_dir=False)
    if args.resume_from_checkpoint not in (None, "auto"):  # a checkpoint of another folder, which is still to be read
        return args
    return dataclasses.replace(args, resume_from_checkpoint=None, overwrite_output_dir=run_in(folder))


def resume_problems(args: RewardGradientConfig) -> Iterator[str]:
    """What is wrong with the checkpoint that is to be gone on from."""
    try:
        path = find_checkpoint(args.resume_from_checkpoint, args.output_dir, quiet=True)  # the run will say more
    except ConfigError as error:
        yield from error.problems
        return
    saved = read_state(path)["settings"]
    for name in FIXED_ON_RESUME:
        if name in saved and saved[name] != getattr(args, name):
            yield (
                f"{name}: got {getattr(args, name)!r}, expected {saved[name]!r} as in {path}: a resumed run "
                "continues the same adapter; set it back, or start another output_dir"
            )
