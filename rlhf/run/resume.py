"""Resuming a run, after a restart by torchrun too: where from, and what has changed."""

import dataclasses
import os
from pathlib import Path

from rlhf.config import RewardGradientConfig
from rlhf.config.older import translate
from rlhf.distributed.layout import RESTART_COUNT
from rlhf.run.checkpoint import newest_undamaged_checkpoint
from rlhf.run.folder import has_run

# Settings of a single launch, which may differ from launch to launch.
LAUNCH_SETTINGS = ("output_dir", "base_dir", "overwrite_output_dir", "resume_from_checkpoint")


def resolve_resume(args: RewardGradientConfig) -> RewardGradientConfig:
    """Return the settings with "auto" resolved: the latest checkpoint, else a fresh start.

    A fresh start overwrites a run without an undamaged checkpoint. A process that torchrun
    restarted resumes as with "auto", whatever the settings say.
    """
    restarted = int(os.environ.get(RESTART_COUNT, 0)) > 0
    if not restarted and args.resume_from_checkpoint != "auto":
        return args
    folder = Path(args.output_dir)
    if newest_undamaged_checkpoint(folder / "checkpoints"):
        return dataclasses.replace(args, resume_from_checkpoint="latest", overwrite_output_dir=False)
    if args.resume_from_checkpoint not in (None, "auto"):  # a checkpoint of another folder, still to be read
        return args
    return dataclasses.replace(args, resume_from_checkpoint=None, overwrite_output_dir=has_run(folder))


def resume_message(path: Path, saved: dict, args: RewardGradientConfig) -> str:
    """Return a line about a resume: step reached, settings changed. saved: `read_state` of path."""
    step, last = saved["step"], args.max_steps
    message = f"Going on from {path}, step {step} of {last}"
    message += "; no step is left, max_steps says how many the whole run has" if step >= last else ""
    settings, moved, _ = translate(saved["settings"])
    now = dataclasses.asdict(args)
    before = {name: value for name, value in settings.items() if name in now and name not in LAUNCH_SETTINGS}
    changed = [f"{name} {value!r} -> {now[name]!r}" for name, value in before.items() if value != now[name]]
    message += f". Other settings than before: {', '.join(changed)}." if changed else "."
    return f"{message} {moved}".rstrip()
