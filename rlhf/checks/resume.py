"""Check a run that is to be resumed: checkpoint, folder and settings, also of earlier versions."""

from collections.abc import Iterator
from pathlib import Path

from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.config.older import translate_old_settings
from rlhf.io import DamagedFileError, run_of_checkpoint
from rlhf.run.checkpoint import (
    checkpoints,
    damage,
    find_checkpoint,
    newest_undamaged_checkpoint,
    read_state,
    step_folders,
)
from rlhf.run.folder import BEST

FIXED_ON_RESUME = ("model", "lora_rank", "lora_alpha", "lora_target_modules", "initial_adapter")


def start_problems(folder: Path) -> Iterator[str]:
    """Yield damaged checkpoints and results in a folder, which a new run would replace.

    Called where the folder has no undamaged checkpoint.
    """
    saved = step_folders(folder / "checkpoints")
    results = [name for name in ("adapter", BEST, "summary.json") if (folder / name).exists()]
    if saved or results:
        got = "; ".join(f"{path}: {damage(path)}" for path in saved) or f"{', '.join(results)} and no checkpoint"
        yield (
            f"resume_from_checkpoint='auto': got {got}, expected a whole checkpoint, or no run in {folder}. Nothing "
            "was removed: put a checkpoint back, choose another output_dir, or set overwrite_output_dir instead"
        )


def resume_problems(args: RewardGradientConfig) -> Iterator[str]:
    """Yield why args cannot resume: no checkpoint, a damaged or older one, other settings."""
    try:
        path = find_checkpoint(args.resume_from_checkpoint, args.output_dir, quiet=True)  # the run will say more
    except ConfigError as error:
        yield from error.problems
        return
    own = Path(args.output_dir) / "checkpoints"
    if path.resolve().parent != own.resolve() and checkpoints(own):
        expected = f"expected a new folder, or that of {path}"
        yield f"output_dir={args.output_dir}: got a run with checkpoints of its own, {expected}; choose another"
    elif (
        path.resolve().parent == own.resolve()
        and (newest := newest_undamaged_checkpoint(own))
        and newest.name != path.name
    ):
        expected = f"expected the newest, since {newest} would stay and count as this run's"
        yield f"resume_from_checkpoint={path}: got an older one, {expected}; choose another output_dir, or 'latest'"
    try:
        state = read_state(path)
    except DamagedFileError as error:
        yield str(error)
        return
    if state["step"] > args.max_steps:
        yield f"max_steps: got {args.max_steps}, expected at least the {state['step']} steps of {path}; raise it"
    best = run_of_checkpoint(path) / BEST
    if args.load_best_model_at_end and state.get("guard") and not best.is_dir():
        yield (
            f"load_best_model_at_end: got no {best}, expected the best adapter of the run that {path} is of; copy it "
            "there, or leave the setting out"
        )
    settings, _, gone = translate_old_settings(state["settings"])
    yield from (f"{path}: {problem}" for problem in gone)
    saved = vars(RewardGradientConfig()) | settings  # the default of settings that are newer than the checkpoint
    for name in FIXED_ON_RESUME:
        if saved[name] != getattr(args, name):
            yield (
                f"{name}: got {getattr(args, name)!r}, expected {saved[name]!r} as in {path}: a resumed run "
                "continues the same adapter and optimizer; set it back, or start another output_dir"
            )
