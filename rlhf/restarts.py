"""Resuming, after a restart by torchrun too: resolve "auto", and check the checkpoint."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from rlhf.checkpoint import checkpoints, find_checkpoint, last_whole, read_state
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.layout import RESTARTS
from rlhf.run_folder import BEST, run_in

# Settings of a single launch, which may differ from launch to launch.
LAUNCH_SETTINGS = ("output_dir", "base_dir", "overwrite_output_dir", "resume_from_checkpoint")
FIXED_ON_RESUME = (
    "model",
    "lora_rank",
    "lora_alpha",
    "lora_target_modules",
    "lora_use_dora",
    "lora_rank_pattern",
    "lora_alpha_pattern",
)


def resolve_resume(args: RewardGradientConfig) -> RewardGradientConfig:
    """Return the settings with "auto" resolved: the latest checkpoint, else a fresh start.

    A fresh start overwrites a run without an undamaged checkpoint. A process that torchrun
    restarted resumes as with "auto", whatever the settings say.
    """
    restarted = int(os.environ.get(RESTARTS, 0)) > 0
    if not restarted and args.resume_from_checkpoint != "auto":
        return args
    folder = Path(args.output_dir)
    if last_whole(folder / "checkpoints"):
        return dataclasses.replace(args, resume_from_checkpoint="latest", overwrite_output_dir=False)
    if args.resume_from_checkpoint not in (None, "auto"):  # a checkpoint of another folder, still to be read
        return args
    return dataclasses.replace(args, resume_from_checkpoint=None, overwrite_output_dir=run_in(folder))


def resume_message(path: Path, saved: dict, args: RewardGradientConfig) -> str:
    """Return a line about a resume: step reached, settings changed. saved: `read_state` of path."""
    step, last = saved["step"], args.max_steps
    message = f"Going on from {path}, step {step} of {last}"
    message += "; no step is left, max_steps says how many the whole run has" if step >= last else ""
    now = dataclasses.asdict(args)
    before = {name: value for name, value in saved["settings"].items() if name in now and name not in LAUNCH_SETTINGS}
    changed = [f"{name} {value!r} -> {now[name]!r}" for name, value in before.items() if value != now[name]]
    return f"{message}. Other settings than before: {', '.join(changed)}." if changed else f"{message}."


def resume_problems(args: RewardGradientConfig) -> Iterator[str]:
    """Yield what prevents a resume from the checkpoint that the settings name."""
    try:
        path = find_checkpoint(args.resume_from_checkpoint, args.output_dir, quiet=True)  # the run logs more
    except ConfigError as error:
        yield from error.problems
        return
    own = Path(args.output_dir) / "checkpoints"
    if path.resolve().parent != own.resolve() and checkpoints(own):
        expected = f"expected a new folder, or that of {path}"
        yield f"output_dir={args.output_dir}: got a run with checkpoints of its own, {expected}; choose another"
    elif path.resolve().parent == own.resolve() and (newest := last_whole(own)) and newest.name != path.name:
        expected = f"expected the newest, since {newest} would stay and count as this run's"
        yield f"resume_from_checkpoint={path}: got an older one, {expected}; choose another output_dir, or 'latest'"
    state = read_state(path)
    best = path.resolve().parent.parent / BEST
    if args.load_best_model_at_end and state.get("guard") and not best.is_dir():
        yield (
            f"load_best_model_at_end: got no {best}, expected the best adapter of the run that {path} is of; copy it "
            "there, or leave the setting out"
        )
    default = vars(RewardGradientConfig())  # of settings that are newer than the checkpoint
    saved = default | state["settings"]
    for name in FIXED_ON_RESUME:
        if saved[name] != getattr(args, name):
            yield (
                f"{name}: got {getattr(args, name)!r}, expected {saved[name]!r} as in {path}: a resumed run "
                "continues the same adapter and optimizer; set it back, or start another output_dir"
            )
