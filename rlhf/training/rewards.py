"""A run's rewards and judges: loaded, probed and mixed, without importing diffusers."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from rewards import RewardMix, load_reward, probe
from rewards.catalogue import CATALOGUE
from rewards.contract import (
    check_generator,
    check_prompts,
    frames_needed,
    require_differentiable,
    reward_attribute,
    reward_name,
    reward_time_limit,
    scores_latents,
    split_spec,
)
from rlhf.checks import all_method_problems
from rlhf.checks.rewards import latent_problems
from rlhf.config import ConfigError, RewardGradientConfig, at_eval_size
from rlhf.device import local_device, return_freed_memory
from rlhf.generator.files import latent_sizes, model_sizes, transformer_digest
from rlhf.method.options import SCORES_ALONE, WITH_GRADIENT, WITHOUT_GRADIENT
from rlhf.prompts import load_prompts
from rlhf.prompts.videos import load_train_prompts

if TYPE_CHECKING:  # importing it takes seconds
    from rlhf.generator.pipeline import VideoPipeline


def open_rewards(
    args: RewardGradientConfig,
    rewards: list[str | Callable] | None = None,
    prompts: list[str] | None = None,
    eval_prompts: list[str] | None = None,
    device: torch.device | None = None,
    pipe: "VideoPipeline | None" = None,
) -> dict[str, Callable]:
    """Load rewards and judges, frozen, on the device; probe each with three of its prompts.

    All of them are asked whether they can read the prompts that they will be given.

    Args:
        args: settings as `check_config` returns them.
        rewards, prompts, eval_prompts, pipe: objects in place of what args name.
        device: Default: that of args.

    Returns the rewards and judges by short name. Raises RewardError for a reward that cannot train
    or a judge that cannot evaluate, and ConfigError as `choose_method` and for settings that do not
    fit rewards of latents, before the generator's weights are loaded.
    """
    device = device or local_device(args.device)
    prompts = prompts or load_train_prompts(args)
    given = args.reward_funcs if rewards is None else rewards
    trained = _load_rewards(given, args, device)
    if eval_prompts is None and args.eval_prompts:
        eval_prompts = load_prompts(args.eval_prompts, args.base_dir, args.num_eval_prompts, args.eval_seed)
    held_out = (eval_prompts or [])[: args.num_eval_prompts]
    weights = _weights(trained, args)
    chosen = choose_method(args, trained)[0]
    with_gradient = chosen.method not in SCORES_ALONE
    for name in trained:
        if weights[name] and with_gradient:
            require_differentiable(name, trained[name])
    in_latents = {name: scores_latents(reward) for name, reward in trained.items()}
    problems = [*latent_problems(chosen, in_latents), *_scale_problems(args, trained), *_window_problems(args, trained)]
    if problems:
        raise ConfigError(problems)
    judges = _load_rewards(args.eval_reward_funcs, args, device)
    shapes = [(3, sized.num_frames, sized.height, sized.width) for sized in (args, at_eval_size(args))]
    card = model_sizes(args.model, pipe)
    info, sizes = {"fps": card["sampling"]["fps"], "seed": args.seed, "step": 0}, latent_sizes(card)
    generator, digest = args.model, partial(transformer_digest, args.model, pipe)
    if args.initial_adapter:  # merged, it is another base
        generator, digest = f"{args.model} with initial_adapter {args.initial_adapter}", lambda: args.initial_adapter
    specs = dict(zip([*trained, *judges], [*given, *args.eval_reward_funcs], strict=True))
    for name, reward in (trained | judges).items():
        asked = [*prompts, *held_out] if name in trained else held_out
        if not asked:  # a judge without prompts judges nothing
            continue
        gradient = with_gradient and bool(weights.get(name))
        seen = dict.fromkeys([shapes[0]] * (name in trained) + [shapes[1]] * bool(held_out))
        with reward_time_limit(name, "its first calls", _seconds(specs[name], args)):
            check_prompts(name, reward, asked)
            check_generator(name, reward, generator, digest)
            for shape in seen:
                graded = gradient and shape == shapes[0]
                probe(reward, shape, asked[:3], device, name=name, info=info, gradient=graded, latents=sizes)
    if device.type != "cpu":
        return_freed_memory()
    return trained | judges


def _scale_problems(args: RewardGradientConfig, trained: dict[str, Callable]) -> Iterator[str]:
    """Yield the problem of a lowest reward among some with and some without mean and spread."""
    if args.reward_mix != "min" or not args.normalise_rewards or args.calibrate_rewards:
        return
    weights = _weights(trained, args)
    raw = [name for name in trained if weights[name] and reward_attribute(trained[name], "std") is None]
    if raw and len(raw) < sum(weight != 0 for weight in weights.values()):
        got, expected = f"min with {', '.join(raw)}, which states no spread", "all rewards on one scale"
        yield f"reward_mix: got {got}, expected {expected}; set calibrate_rewards, such as to 32"


def _window_problems(args: RewardGradientConfig, trained: dict[str, Callable]) -> Iterator[str]:
    """Yield the problem of a decode_window that holds every frame that is decoded."""
    frames = max(frames_needed(reward, args.num_frames) for reward in trained.values())
    if args.decode_window is not None and args.decode_window >= frames:
        to_decode = f"with {frames} of {args.num_frames} frames to decode for {', '.join(trained)}"
        yield f"decode_window: got {args.decode_window} {to_decode}, expected fewer; lower it, or leave it out"


def choose_method(
    args: RewardGradientConfig, trained: dict[str, Callable]
) -> tuple[RewardGradientConfig, dict[str, str]]:
    """Replace the method "auto": by the gradient if all trained rewards have one, else by scores.

    trained: the rewards to train on, by short name; those of weight 0 have no say.

    Returns the settings and, for the log, {"method": the choice and its reason}; {} for another
    method. Raises ConfigError with the settings that do not fit the choice.
    """
    if args.method != "auto":
        return args, {}
    weights = _weights(trained, args)
    without = [name for name in trained if weights[name] and not reward_attribute(trained[name], "differentiable")]
    method = WITHOUT_GRADIENT if without else WITH_GRADIENT
    reason = f"no gradient of {', '.join(without)}" if without else "all trained rewards have a gradient"
    args = dataclasses.replace(args, method=method)
    if problems := all_method_problems(args):
        raise ConfigError([f"{problem} (method auto chose {method}: {reason})" for problem in problems])
    return args, {"method": f"{method}, chosen by auto: {reason}"}


def _weights(trained: dict[str, Callable], args) -> dict[str, float]:
    """Return each trained reward's weight, 1 by default."""
    return dict(zip(trained, args.reward_weights or [1.0] * len(trained), strict=True))


def _seconds(reward: str | Callable, args: RewardGradientConfig) -> float | None:
    """Return the limit of time of a reward's first calls; None for a built-in one."""
    return None if isinstance(reward, str) and split_spec(reward)[1] in CATALOGUE else args.reward_timeout


def _load_rewards(rewards: list[str | Callable], args, device: torch.device) -> dict[str, Callable]:
    """Return frozen rewards by short name: specs loaded, callables taken as they are."""
    loaded, kwargs = {}, args.reward_kwargs or {}
    for reward in rewards:
        name = reward_name(reward)
        if isinstance(reward, str):
            reward = load_reward(reward, args.base_dir, reward_timeout=args.reward_timeout, **kwargs.get(name, {}))
        if isinstance(reward, torch.nn.Module):
            reward.to(device).requires_grad_(False).eval()
        loaded[name] = reward
    return loaded


def mix_rewards(opened: dict[str, Callable], count: int, args: RewardGradientConfig) -> RewardMix:
    """Return the mix of the leading `count` opened rewards, the trained ones."""
    return RewardMix(
        dict(list(opened.items())[:count]),
        args.reward_weights,
        args.normalise_rewards,
        args.reward_caps,
        args.reward_targets,
        args.balance_reward_gradients,
        lowest=args.reward_mix == "min",
    )
