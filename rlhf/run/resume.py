"""Resuming a run, after a restart by torchrun too: where from, and what has changed."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from rewards.load import source_digests
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.config.older import translate_old_settings
from rlhf.distributed.launch import RESTART_COUNT, launcher_world_size
from rlhf.generator.files import describe_model
from rlhf.io import DamagedFileError
from rlhf.run.checkpoint import find_checkpoint, newest_undamaged_checkpoint, read_state
from rlhf.run.folder import has_run
from rlhf.types import row_of

# Settings of a single launch, which may differ from launch to launch.
LAUNCH_SETTINGS = ("output_dir", "base_dir", "overwrite_output_dir", "resume_from_checkpoint")
EARLIER_SPACING = "drift_weighting"  # a setting of the versions whose prefix_steps were evenly spaced


def resolve_resume(args: RewardGradientConfig) -> RewardGradientConfig:
    """Return the settings with "auto" as the latest checkpoint, if there is an undamaged one.

    "auto" stays where there is none: the run starts, and keeps what is in the folder. A process
    that torchrun restarted resumes as with "auto", whatever the settings say.
    """
    restarted = int(os.environ.get(RESTART_COUNT, 0)) > 0
    if not restarted and (args.resume_from_checkpoint != "auto" or args.overwrite_output_dir):
        return args
    if newest_undamaged_checkpoint(Path(args.output_dir) / "checkpoints"):
        return dataclasses.replace(args, resume_from_checkpoint="latest", overwrite_output_dir=False)
    if args.resume_from_checkpoint not in (None, "auto"):  # a checkpoint of another folder, still to be read
        return args
    return dataclasses.replace(args, resume_from_checkpoint="auto", overwrite_output_dir=False)


def keep_chosen_method(args: RewardGradientConfig) -> RewardGradientConfig:
    """Return the settings with the method of the checkpoint to resume in place of "auto"."""
    if args.method != "auto" or args.resume_from_checkpoint in (None, "auto"):
        return args
    try:
        saved = read_state(find_checkpoint(args.resume_from_checkpoint, args.output_dir, quiet=True))
    except (ConfigError, DamagedFileError):  # of which resume_problems speaks
        return args
    settings, _, _ = translate_old_settings(saved["settings"])
    return dataclasses.replace(args, method=settings.get("method", args.method))


def restart_message(args: RewardGradientConfig) -> str:
    """Return a line about starting anew in the folder of a run without a checkpoint; "" if not."""
    if args.overwrite_output_dir or not has_run(Path(args.output_dir)):
        return ""
    return f"{args.output_dir} holds a run without a checkpoint: starting it again, and keeping what is there\n"


def describe_inputs(
    args: RewardGradientConfig, prompts: list[str], eval_prompts: list[str], captions: list[str] | None = None
) -> dict[str, str]:
    """Return what identifies the content of a run's inputs, by the setting that names them.

    captions: of `anchor_data`, with the names of the files.
    """
    found = {"prompts": _describe_prompts(prompts), "eval_prompts": _describe_prompts(eval_prompts)}
    found |= {"anchor_data": _describe_prompts(captions)} if captions else {}
    found["model"] = str(describe_model(args.model))
    sources = source_digests([*args.reward_funcs, *args.eval_reward_funcs], args.base_dir, args.reward_kwargs)
    return found | {f"reward {name}": f"digest {_digest(text)}" for name, text in sources.items()}


def _describe_prompts(prompts: list[str]) -> str:
    """Return the number of prompts and a digest of their rows."""
    return f"{len(prompts)} prompts, digest {_digest([*map(row_of, prompts)])}"


def _digest(content) -> str:
    """Return 16 digits of the content's SHA-256, as JSON."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def resume_message(path: Path, saved: dict, args: RewardGradientConfig, inputs: dict[str, str]) -> str:
    """Return a line about a resume: step reached, settings and content of inputs that changed.

    saved: `read_state` of path. inputs: `describe_inputs` of this start.
    """
    step, last = saved["step"], args.max_steps
    message = f"Going on from {path}, step {step} of {last}"
    message += "; no step is left, max_steps says how many the whole run has" if step >= last else ""
    settings, moved, _ = translate_old_settings(saved["settings"])
    now = dataclasses.asdict(args)
    before = {name: value for name, value in settings.items() if name in now and name not in LAUNCH_SETTINGS}
    changed = [f"{name} {value!r} -> {now[name]!r}" for name, value in before.items() if value != now[name]]
    message += f". Other settings than before: {', '.join(changed)}." if changed else "."
    if EARLIER_SPACING in saved["settings"] and settings.get("prefix_steps") and args.prefix_steps:
        message += " prefix_steps keeps more of the first steps than it did in the version that began the run."
    return f"{message}{_input_message(saved, inputs)}{_batch_message(saved, settings, args)} {moved}".rstrip()


def _input_message(saved: dict, inputs: dict[str, str]) -> str:
    """Return a sentence on inputs whose content is another than at the checkpoint; "" if none."""
    before = saved.get("inputs", {})
    changed = [f"{name} ({before[name]} -> {now})" for name, now in inputs.items() if before.get(name, now) != now]
    tail = "The run goes on with what is there now, and measures the base anew where that counts."
    return f" Other content than before: {', '.join(changed)}. {tail}" if changed else ""


def _batch_message(saved: dict, before: dict, args: RewardGradientConfig) -> str:
    """Return a sentence on processes and samples of a step, if either is another; "" if not."""
    now = vars(args) | {"processes": launcher_world_size()}
    before = vars(RewardGradientConfig()) | before | {"processes": saved.get("processes", 1)}
    old, new = (
        of["processes"]
        // (of["guidance_parallel"] * of["sequence_parallel"])
        * of["per_device_train_batch_size"]
        * of["gradient_accumulation_steps"]
        for of in (before, now)
    )
    if old == new and before["processes"] == now["processes"]:
        return ""
    samples = f"{old} -> {new}" if old != new else f"{new} as before"
    return f" Processes: {before['processes']} -> {now['processes']}, samples of a step: {samples}."
