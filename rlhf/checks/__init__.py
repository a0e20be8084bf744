"""Check settings against each other and the model: all problems at once, before weights load."""

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.checks.execution import execution_problems
from rlhf.checks.method import adapter_problems, method_problems, read_initial
from rlhf.checks.parallel import parallel_problems
from rlhf.checks.resume import resume_problems, start_problems
from rlhf.checks.rewards import built_in_latent_problems, problems_raised_by, reward_problems
from rlhf.config import VIDEO_SIZE, ConfigError, RewardGradientConfig, range_problems, with_sampling
from rlhf.device import multiplies_bfloat16, pick_device
from rlhf.generator.files import SamplingDefaults, model_sizes
from rlhf.generator.registry import spatial_patch
from rlhf.method.options import AUTO_CHOICES
from rlhf.prompts import load_prompts
from rlhf.run.folder import RUN_FILES, has_run
from rlhf.run.lock import lock_problem
from rlhf.run.resume import keep_chosen_method, resolve_resume

if TYPE_CHECKING:  # importing it takes seconds
    from rlhf.generator.pipeline import VideoPipeline

# Accelerate's; each is the name of its package, too.
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")


def check_config(
    args: RewardGradientConfig,
    pipe: "VideoPipeline | None" = None,
    rewards: list[str | Callable] | None = None,
    train_prompts: list[str] | None = None,
    eval_prompts: list[str] | None = None,
    planned_processes: int | None = None,
) -> RewardGradientConfig:
    """Check all settings and return them with defaults of the model and the device filled in.

    Args:
        args: the settings.
        pipe: the pipeline, in place of the model that args name; so are the next three.
        rewards: the rewards.
        train_prompts: the prompts to train on.
        eval_prompts: the held-out prompts.
        planned_processes: for a dry run, how many processes it plans for. Default: those started.

    Raises ConfigError with every problem of the settings.
    """
    args = keep_chosen_method(resolve_resume(args))
    problems = [*_folder_problems(args, dry=planned_processes is not None)]
    problems += [*reward_problems(args, rewards), *_tracker_problems(args)]
    problems += [*_device_problems(args), *_guard_problems(args, eval_prompts), *_clip_problems(args)]
    for given, name in ((train_prompts, args.prompts), (eval_prompts, args.eval_prompts)):
        if given is None and name is not None:
            problems += problems_raised_by(load_prompts, name, args.base_dir, 1)
    try:
        sizes = model_sizes(args.model, pipe)
    except ValueError as error:
        problems.append(str(error))
    else:
        initial = None
        try:
            initial = read_initial(args, sizes["transformer"])
        except ConfigError:
            pass  # of a checkpoint that resume_problems looks at
        except ValueError as error:
            problems.append(f"initial_adapter: {error}")
        unguided = {"guidance_scale": 1.0} if initial and initial.distilled else {}
        args = with_sampling(args, sizes["sampling"] | unguided)
        problems += _size_problems(args, sizes)
        problems += [*adapter_problems(args, sizes["transformer"]), *all_method_problems(args)]
        problems += parallel_problems(args, planned_processes)
        problems += _video_problems(args, sizes)
        problems += [] if problems else built_in_latent_problems(args, rewards)
    if problems := [*range_problems(args), *problems]:
        raise ConfigError(problems)
    if args.vae_dtype == "auto":
        fast = multiplies_bfloat16(pick_device(args.device))
        args = dataclasses.replace(args, vae_dtype="bfloat16" if fast else "float32")
    return args


def all_method_problems(args: RewardGradientConfig) -> list[str]:
    """Return the problems of the method with every other setting.

    Rewards decide later what `auto` becomes. Until then its problems are those of both choices, if
    neither can run.
    """
    if args.method != "auto":
        return [*method_problems(args), *execution_problems(args)]
    found = [all_method_problems(dataclasses.replace(args, method=method)) for method in AUTO_CHOICES]
    return list(dict.fromkeys(sum(found, []))) if all(found) else []


def check_sampling(model: str, given: dict[str, Any], seed: int, device: str | None) -> None:
    """Check how a video is to be sampled, without weights.

    given: values of sampling in place of the model's own. Raises ConfigError with every problem.
    """
    sizes = model_sizes(model)
    sampling = SamplingDefaults(**sizes["sampling"] | given)
    args = RewardGradientConfig(model=model, seed=seed, device=device, **sampling.call_arguments())
    if problems := [*range_problems(args), *_device_problems(args), *_size_problems(args, sizes)]:
        raise ConfigError(problems)


def _device_problems(args) -> list[str]:
    """Return the problem of a numbered device, or of one that is not here."""
    if args.device is not None and ":" in args.device:
        kind = args.device.split(":")[0]
        return [f"device: got {args.device!r}, expected a kind; use {kind} and hide the other devices from the process"]
    return problems_raised_by(pick_device, args.device)


def _size_problems(args, sizes: dict[str, dict]) -> Iterator[str]:
    """Yield heights, widths and frame numbers that VAE and patches do not divide.

    Those of eval_size too, with its unknown names. sizes: of `model_sizes`.
    """
    stride = 2 ** len(sizes["vae"]["temperal_downsample"]) * spatial_patch(sizes["transformer"])
    stride_t = 2 ** sum(sizes["vae"]["temperal_downsample"])
    evaluated = args.eval_size or {}
    for name in evaluated.keys() - set(VIDEO_SIZE):
        yield f"eval_size: got {name!r}, expected {', '.join(VIDEO_SIZE)} or some of them; correct it"
    given = [(name, getattr(args, name)) for name in VIDEO_SIZE]
    given += [(f"eval_size: {name}", evaluated[name]) for name in VIDEO_SIZE if name in evaluated]
    for name, size in given:
        if not name.endswith("num_frames") and (size < stride or size % stride):
            near = max(stride, round(size / stride) * stride)
            yield f"{name}={size} is not divisible by {stride} (VAE times patch of {args.model}); use {near}"
        if name.endswith("num_frames") and (size < 1 or size % stride_t != 1 % stride_t):
            near = max(1, round((size - 1) / stride_t) * stride_t + 1)
            yield f"{name}={size} is not {stride_t}k+1, as the VAE of {args.model} needs; use {near}"


def _video_problems(args, sizes: dict[str, dict]) -> list[str]:
    """Return the problems of the files of anchor_data; [] without it."""
    if args.anchor_data is None:
        return []
    from rlhf.prompts.videos import video_problems  # takes a while to import

    return list(video_problems(args, sizes["sampling"]["fps"]))


def _guard_problems(args, eval_prompts) -> Iterator[str]:
    """Yield what early stopping and loading the best adapter lack: evaluations of 2 prompts."""
    asked = [n for n in ("early_stopping_patience", "load_best_model_at_end") if getattr(args, n)]
    missing = [n for n in ("eval_steps", "eval_reward_funcs") if not getattr(args, n)]
    if args.eval_prompts is None and eval_prompts is None:
        missing.append("eval_prompts")
    if asked and missing:
        yield (
            f"{' and '.join(asked)}: got no {' and no '.join(missing)}, expected evaluations during the training by a "
            "reward that is not trained on; set them"
        )
    if asked and 1 in (args.num_eval_prompts, len(eval_prompts or [])):
        got = "got one held-out prompt, expected two or more: gains are in standard deviations over prompts"
        yield f"{' and '.join(asked)}: {got}; raise num_eval_prompts"


def _clip_problems(args) -> Iterator[str]:
    """Yield the problem of a max_grad_norm with which no weight would move."""
    least = max(1e-12, 1e-3 * args.adam_epsilon)
    if 0 < args.max_grad_norm < least:
        yield (
            f"max_grad_norm: got {args.max_grad_norm:g}, with which no weight would move, expected at least {least:g} "
            f"(a thousandth of adam_epsilon, and 1e-12), or 0 for no limit; raise it"
        )


def _folder_problems(args, dry: bool) -> Iterator[str]:
    """Yield the first problem of output_dir: path, access, another run, resuming, overwriting.

    dry: for a dry run, which needs no write access and no free folder.
    """
    folder = Path(args.output_dir)
    if not args.output_dir:
        yield "output_dir: got an empty path, expected a folder; name one, such as . for where you are"
    elif folder.exists() and not folder.is_dir():
        yield f"output_dir={args.output_dir} is a file, expected a folder or a new path; choose another"
    elif not dry and not _may_write(here := _nearest_existing(folder)):
        yield f"output_dir={args.output_dir}: got no right to write in {here}, expected one; choose another"
    elif not dry and (problem := lock_problem(folder)):
        yield problem
    elif args.resume_from_checkpoint and args.overwrite_output_dir:
        yield "resume_from_checkpoint and overwrite_output_dir: got both, expected one of them; leave one out"
    elif args.overwrite_output_dir and (links := [name for name in RUN_FILES if (folder / name).is_symlink()]):
        expected = "expected what can be removed without removing what others put there"
        yield f"overwrite_output_dir: got links in {folder}, {', '.join(links)}, {expected}; remove them yourself"
    elif not args.overwrite_output_dir and (wrong := _wrong_kinds(folder)):
        expected = "expected what a run leaves; move it away, or choose another"
        yield f"output_dir={args.output_dir}: got {', '.join(wrong)} in it, {expected}"
    elif args.resume_from_checkpoint == "auto":
        yield from start_problems(folder)
    elif args.resume_from_checkpoint:
        yield from resume_problems(args)
    elif not args.overwrite_output_dir and has_run(folder):
        yield (
            f"output_dir={args.output_dir} holds a run already, expected a new folder; choose another --output_dir, "
            "go on with --resume_from_checkpoint latest, or replace it with --overwrite_output_dir"
        )


def _wrong_kinds(folder: Path) -> list[str]:
    """Return the files of a run, which have an ending, that are folders here, and the reverse."""
    found = [name for name in RUN_FILES if (folder / name).exists() and (folder / name).is_dir() == ("." in name)]
    return [f"the {'folder' if '.' in name else 'file'} {name}" for name in found]


def _nearest_existing(path: Path) -> Path:
    """Return the path, or the nearest folder or file above it."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _may_write(place: Path) -> bool:
    """Return whether `place` is a folder that rank 0 can write to; True on other ranks."""
    return os.environ.get("RANK", "0") != "0" or (place.is_dir() and os.access(place, os.W_OK))


def _tracker_problems(args) -> Iterator[str]:
    """Yield trackers of report_to that are unknown or not installed."""
    for name in args.report_to:
        if name not in TRACKERS:
            yield f"report_to: got {name!r}, expected some of {', '.join(TRACKERS)}, or none; correct it"
        elif importlib.util.find_spec(name) is None:
            yield f"report_to: got {name!r}, which is not installed; pip install {name}, or set report_to to none"
