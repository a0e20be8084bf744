"""Runs that go on by themselves: after a restart by torchrun, or wherever resume_from_checkpoint is "auto"."""

import dataclasses
import os
from pathlib import Path

from rlhf.checkpoint import last_whole
from rlhf.config import RewardGradientConfig
from rlhf.layout import RESTARTS
from rlhf.older_settings import translate
from rlhf.run_folder import run_in

OF_A_START = ("output_dir", "base_dir", "overwrite_output_dir", "resume_from_checkpoint")


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


def told_of_resuming(path: Path, saved: dict, args: RewardGradientConfig) -> str:
    """A line for whoever goes on from a checkpoint: where the run stands, and which settings are no longer the same."""
    step, last = saved["step"], args.max_steps
    told = f"Going on from {path}, step {step} of {last}"
    told += "; no step is left, max_steps says how many the whole run has" if step >= last else ""
    settings, moved, _ = translate(saved["settings"])
    now = dataclasses.asdict(args)
    before = {name: value for name, value in settings.items() if name in now and name not in OF_A_START}
    changed = [f"{name} {value!r} -> {now[name]!r}" for name, value in before.items() if value != now[name]]
    told += f". Other settings than before: {', '.join(changed)}." if changed else "."
    return f"{told} {moved}".rstrip()
