"""What can be wrong between settings, found all at once and before any weight is loaded."""

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rewards import load_reward, probe
from rlhf.config import SAMPLING_KEYS, ConfigError, RewardGradientConfig
from rlhf.contentv.files import SamplingDefaults, model_config
from rlhf.device import local_device, pick_device
from rlhf.method_checks import GUIDANCE_GRADIENTS, METHODS, adapter_problems, method_problems
from rlhf.parallel_checks import parallel_problems
from rlhf.prompts import load_prompts
from rlhf.restarts import resolve_resume
from rlhf.resume_checks import resume_problems
from rlhf.reward_checks import reward_problems, short_name, told_by
from rlhf.run_folder import run_in
from rlhf.speed_checks import speed_problems

if TYPE_CHECKING:  # not for a look at settings: it takes seconds
    from rlhf.contentv.pipeline import ContentVPipeline

AT_LEAST_ONE = (
    "num_inference_steps",
    "num_grad_steps",
    "lora_rank",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_prompts",
    "num_eval_prompts",
    "per_device_eval_batch_size",
    "max_sequence_length",
    "decode_chunk",
    "cpu_threads",
    "plan_processes",
    "lora_alpha",
    "jump_steps",
    "num_draws",
)
NOT_NEGATIVE = (
    "calibrate_rewards",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "max_skipped_steps",
    "save_steps",
    "save_total_limit",
    "eval_steps",
    "sample_steps",
    "num_sample_prompts",
    "num_diversity_prompts",
    "relative_strength",
    "drift_weight",
    "anchor_steps",
    "early_stopping_patience",
    "early_stopping_threshold",
)
BELOW_ONE = ("adam_beta1", "adam_beta2", "ema_decay")
CHOICES = {
    "dtype": ("auto", "float32", "bfloat16"),
    "lr_scheduler_type": ("constant", "linear"),
    "method": METHODS,
    "guidance_gradient": GUIDANCE_GRADIENTS,
    "drift_weighting": ("kl", "even"),
}
# Accelerate's; each is the name of its package too.
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")


def check_config(
    args: RewardGradientConfig,
    pipe: "ContentVPipeline | None" = None,
    rewards: list[str | Callable] | None = None,
    train_prompts: list[str] | None = None,
    eval_prompts: list[str] | None = None,
) -> RewardGradientConfig:
    """The settings with the model's own sampling where none was set. Raises ConfigError with every problem of them.

    What was handed over as an object instead of named in args - a pipeline, rewards, prompts - is taken as it is.
    """
    args = resolve_resume(args)
    problems = [*_out_of_range(args), *_run_folder(args), *reward_problems(args, rewards), *_trackers(args)]
    problems += [*_device(args), *_guards(args, eval_prompts)]
    for given, name in ((train_prompts, args.prompts), (eval_prompts, args.eval_prompts)):
        if given is None and name is not None:
            problems += told_by(load_prompts, name, args.base_dir, 1)
    try:
        card = model_card(args.model, pipe)
    except ValueError as error:
        problems.append(str(error))
    else:
        args = with_sampling(args, card["sampling"])
        problems += _sampling(args, card)
    if problems:
        raise ConfigError(problems)
    return args


def open_rewards(
    args: RewardGradientConfig,
    rewards: list[str | Callable] | None = None,
    prompts: list[str] | None = None,
    device: torch.device | None = None,
    pipe: "ContentVPipeline | None" = None,
) -> dict[str, Callable]:
    """The rewards, then the judges, by short name: frozen, on the device, those that train probed with three prompts.

    A reward that cannot train is found here, before the generator's weights are loaded. args: as `check_config` returns
    them. rewards, prompts, pipe: instead of those that args name. Raises RewardError.
    """
    device = device or local_device(args.device)
    prompts = prompts or load_prompts(args.prompts, args.base_dir, args.num_train_prompts, args.seed)
    trained = _load_rewards(args.reward_funcs if rewards is None else rewards, args, device)
    shape = (3, args.num_frames, args.height, args.width)
    info = {"fps": model_card(args.model, pipe)["sampling"]["fps"], "seed": args.seed, "step": 0}
    for name, reward in trained.items():
        probe(reward, shape, prompts[:3], device, name=name, info=info)
    return trained | _load_rewards(args.eval_reward_funcs, args, device)


def model_card(model: str, pipe: "ContentVPipeline | None" = None) -> dict[str, dict]:
    """The sizes of a model by part, as `model_config` has them, without its weights. ValueError if absent."""
    if pipe is not None:
        parts = {"transformer": dict(pipe.transformer.config), "vae": dict(pipe.vae.config)}
        parts["tokenizer"] = {"model_max_length": pipe.tokenizer_max_length}
        return parts | {"sampling": vars(pipe.sampling)}
    return model_config(model)


def with_sampling(args: RewardGradientConfig, defaults: SamplingDefaults | dict) -> RewardGradientConfig:
    """The settings with the model's own values where none was set. defaults: as a dict, too."""
    defaults = defaults if isinstance(defaults, dict) else vars(defaults)
    unset = {key: defaults[key] for key in SAMPLING_KEYS if getattr(args, key) is None}
    return dataclasses.replace(args, **unset)


def _load_rewards(rewards: list[str | Callable], args, device: torch.device) -> dict[str, Callable]:
    """Rewards by short name, frozen: specs are loaded with their reward_kwargs, callables taken as they are."""
    loaded, kwargs = {}, args.reward_kwargs or {}
    for reward in rewards:
        name = short_name(reward)
        if isinstance(reward, str):
            reward = load_reward(reward, args.base_dir, **kwargs.get(name, {}))
        if isinstance(reward, torch.nn.Module):
            reward.to(device).requires_grad_(False).eval()
        loaded[name] = reward
    return loaded


def _device(args):
    if args.device is not None and ":" in args.device:
        kind = args.device.split(":")[0]
        return [f"device: got {args.device!r}, expected a kind; use {kind} and hide the other devices from the process"]
    return told_by(pick_device, args.device)


def _out_of_range(args):
    for names, least in ((AT_LEAST_ONE, 1), (NOT_NEGATIVE, 0)):
        for name in names:
            value = getattr(args, name)
            if value is not None and not value >= least:
                yield f"{name}: got {value}, expected at least {least}; raise it"
    for name, choices in CHOICES.items():
        if getattr(args, name) not in choices:
            yield f"{name}: got {getattr(args, name)!r}, expected one of {', '.join(choices)}; choose one"
    if args.decode_checkpoint and args.decode_chunk is None:
        yield "decode_checkpoint: got no decode_chunk, expected one, since a single chunk saves nothing; set it to 1"
    for name in ("seed", "eval_seed"):
        if not -(2**63) <= getattr(args, name) < 2**64:
            yield f"{name}: got {getattr(args, name)}, expected a number of 64 bits, as PyTorch takes; choose another"
    if not args.adam_epsilon > 0:
        got = f"adam_epsilon: got {args.adam_epsilon}, expected more than 0"
        yield f"{got}: A of a new adapter has no gradient yet, and 0 / 0 is no number; raise it"
    for name in BELOW_ONE:
        if not 0 <= getattr(args, name) < 1:
            yield f"{name}: got {getattr(args, name)}, expected 0 <= {name} < 1; correct it"


def _sampling(args, card):
    """Problems of size, frames and steps, for the model of the card; args has all sampling keys set."""
    stride = 2 ** len(card["vae"]["temperal_downsample"]) * card["transformer"]["patch_size"]
    every = 2 ** sum(card["vae"]["temperal_downsample"])
    for name in ("height", "width"):
        size = getattr(args, name)
        if size < stride or size % stride:
            near = max(stride, round(size / stride) * stride)
            yield f"{name}={size} is not divisible by {stride} (VAE times patch of {args.model}); use {near}"
    if args.num_frames < 1 or args.num_frames % every != 1 % every:
        near = max(1, round((args.num_frames - 1) / every) * every + 1)
        yield f"num_frames={args.num_frames} is not {every}k+1, as the VAE of {args.model} needs; use {near}"
    yield from method_problems(args)
    yield from adapter_problems(args, card["transformer"])
    yield from speed_problems(args)
    yield from parallel_problems(args)


def _guards(args, eval_prompts):
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
        told = "got one held-out prompt, expected two or more: gains are in spreads over prompts"
        yield f"{' and '.join(asked)}: {told}; raise num_eval_prompts"


def _run_folder(args):
    folder = Path(args.output_dir)
    if not args.output_dir:
        yield "output_dir: got an empty path, expected a folder; name one, such as . for where you are"
    elif folder.exists() and not folder.is_dir():
        yield f"output_dir={args.output_dir} is a file, expected a folder or a new path; choose another"
    elif not args.dry_run and not _may_write(here := _first_that_exists(folder)):
        yield f"output_dir={args.output_dir}: got no right to write in {here}, expected one; choose another"
    elif args.resume_from_checkpoint and args.overwrite_output_dir:
        yield "resume_from_checkpoint and overwrite_output_dir: got both, expected one of them; leave one out"
    elif args.resume_from_checkpoint:
        yield from resume_problems(args)
    elif not args.overwrite_output_dir and run_in(folder):
        yield (
            f"output_dir={args.output_dir} holds a run already, expected a new folder; choose another --output_dir, "
            "go on with --resume_from_checkpoint latest, or replace it with --overwrite_output_dir"
        )


def _first_that_exists(path: Path) -> Path:
    """The path or the nearest folder, or file, above it."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _may_write(place: Path) -> bool:
    """Only the first process writes; the hosts of others need no such folder."""
    return os.environ.get("RANK", "0") != "0" or (place.is_dir() and os.access(place, os.W_OK))


def _trackers(args):
    for name in args.report_to:
        if name not in TRACKERS:
            yield f"report_to: got {name!r}, expected some of {', '.join(TRACKERS)}, or none; correct it"
        elif importlib.util.find_spec(name) is None:
            yield f"report_to: got {name!r}, which is not installed; pip install {name}, or set report_to to none"
