"""What a trainer starts from: arguments checked before anything heavy is loaded, prompts, frozen models, sizes."""

import dataclasses
from collections.abc import Callable, Iterable

import torch

from rewards import reward_name
from rlhf.checks import check_config
from rlhf.config import RewardGradientConfig
from rlhf.contentv.pipeline import ContentVPipeline
from rlhf.prompts import as_prompts, load_prompts


@dataclasses.dataclass
class Inputs:
    """The arguments of `RewardGradientTrainer`, of one form each; None for what args name and is yet to be loaded."""

    args: RewardGradientConfig
    pipe: ContentVPipeline | None
    rewards: list[str | Callable]
    train_prompts: list[str] | None
    eval_prompts: list[str] | None


def checked_inputs(
    model: str | ContentVPipeline | None,
    reward_funcs: str | Callable | list[str | Callable] | None,
    args: RewardGradientConfig | None,
    train_dataset: Iterable | None,
    eval_dataset: Iterable | None,
) -> Inputs:
    """Raises ConfigError, with everything that is wrong at once."""
    args = args or RewardGradientConfig()
    args = dataclasses.replace(args, model=model if isinstance(model, str) else args.model)
    pipe = None if model is None or isinstance(model, str) else model
    rewards = args.reward_funcs if reward_funcs is None else reward_funcs
    rewards = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
    args.reward_funcs = [r if isinstance(r, str) else reward_name(r) for r in rewards]
    train_prompts = None if train_dataset is None else as_prompts(train_dataset)
    eval_prompts = None if eval_dataset is None else as_prompts(eval_dataset)
    check_config(args, pipe, rewards, train_prompts, eval_prompts)
    return Inputs(args, pipe, rewards, train_prompts, eval_prompts)


def load_prompt_sets(inputs: Inputs, args: RewardGradientConfig) -> tuple[list[str], list[str]]:
    """The prompts to train on and those held out, [] for none, as handed over or as args name them."""
    train = inputs.train_prompts or load_prompts(args.prompts, args.base_dir, args.num_train_prompts, args.seed)
    held_out = inputs.eval_prompts
    if held_out is None and args.eval_prompts:
        held_out = load_prompts(args.eval_prompts, args.base_dir, args.num_eval_prompts, args.eval_seed)
    return train, (held_out or [])[: args.num_eval_prompts]


def freeze(pipe: ContentVPipeline, judges: Iterable[Callable], device: torch.device) -> None:
    """Everything on the device, without gradient and in evaluation mode; the VAE in float32."""
    for module in [pipe.transformer, pipe.vae.float(), *judges]:
        if isinstance(module, torch.nn.Module):
            module.to(device).requires_grad_(False).eval()


def latent_shape(pipe: ContentVPipeline, args: RewardGradientConfig) -> tuple[int, int, int, int]:
    """(C, T, H, W) of the latents of one video."""
    frames = (args.num_frames - 1) // pipe.vae_scale_factor_temporal + 1
    size = (args.height // pipe.vae_scale_factor, args.width // pipe.vae_scale_factor)
    return pipe.transformer.config.in_channels, frames, *size


def base_dtype(name: str) -> torch.dtype | None:
    """None, for "auto", leaves the choice to the loader."""
    return None if name == "auto" else getattr(torch, name)
