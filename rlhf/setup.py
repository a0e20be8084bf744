"""What a trainer starts from: arguments checked before anything heavy is loaded, prompts, rewards, frozen models."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig

from rewards import RewardMix, load_reward, probe, reward_name
from rlhf.adapter.masters import Masters
from rlhf.checks import check_config
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.contentv.files import model_sizes
from rlhf.contentv.loading import TEXT_ENCODERS, load_pipeline
from rlhf.contentv.pipeline import ContentVPipeline
from rlhf.contentv.wan_decoder import use_channels_last
from rlhf.device import local_device
from rlhf.layout import Layout
from rlhf.lora import ATTENTION, add_adapter, lora_config, settings_of
from rlhf.prompts import as_prompts, load_prompts
from rlhf.reward_checks import short_name
from rlhf.run_folder import prompt_snapshot
from rlhf.sampling_copy import require_float8
from rlhf.speed import Speed, UnsupportedOptionError, require_compiler, require_kernel, set_up_blocks
from rlhf.text import PromptCache, encode_prompts

KEEP_THE_BASE = ("gaussian", "orthogonal")  # of peft's names for an adapter's first weights


@dataclasses.dataclass
class Inputs:
    """The arguments of `RewardGradientTrainer`, of one form each; None for what args name and is yet to be loaded."""

    args: RewardGradientConfig
    pipe: ContentVPipeline | None
    rewards: list[str | Callable]
    train_prompts: list[str] | None
    eval_prompts: list[str] | None


def checked_inputs(
    model: str | Path | ContentVPipeline | None,
    reward_funcs: str | Callable | list[str | Callable] | None,
    args: RewardGradientConfig | None,
    train_dataset: Iterable | None,
    eval_dataset: Iterable | None,
    peft_config: PeftConfig | None = None,
) -> Inputs:
    """The trainer's arguments in one form. Raises ConfigError, with everything that is wrong at once."""
    args = args or RewardGradientConfig()
    if problems := [*_wrong_types(model, reward_funcs, args, peft_config), *_adapter_problems(model, peft_config)]:
        raise ConfigError(problems)
    named = isinstance(model, str | Path)
    args = dataclasses.replace(args, model=str(model) if named else args.model)
    pipe = None if named else model
    rewards = args.reward_funcs if reward_funcs is None else reward_funcs
    rewards = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
    args.reward_funcs = [r if isinstance(r, str) else reward_name(r) for r in rewards]
    train_prompts = None if train_dataset is None else as_prompts(train_dataset, "train_dataset")
    eval_prompts = None if eval_dataset is None else as_prompts(eval_dataset, "eval_dataset")
    args = dataclasses.replace(args, **settings_of(peft_config))  # those of the adapter that a checkpoint has to have
    args = check_config(args, pipe, rewards, train_prompts, eval_prompts)
    handed = {"prompts": train_prompts, "eval_prompts": eval_prompts}
    told = {name: prompt_snapshot(args, name) for name, prompts in handed.items() if prompts is not None}
    args = dataclasses.replace(args, **told)
    return Inputs(args, pipe, rewards, train_prompts, eval_prompts)


def _wrong_types(model, reward_funcs, args, peft_config) -> Iterator[str]:
    expected = {
        "model": (model, str | Path | ContentVPipeline, "a name, a path or a ContentVPipeline; rlhf.contentv.loading"),
        "args": (args, RewardGradientConfig, "a RewardGradientConfig; rlhf.config"),
        "peft_config": (peft_config, LoraConfig, "a LoraConfig, whose files diffusers reads; peft"),
    }
    for name, (given, kind, told) in expected.items():
        if given is not None and not isinstance(given, kind):
            yield f"{name}: got a {type(given).__name__}, expected {told} has it"
    for reward in reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]:
        if isinstance(reward, type):
            yield f"reward_funcs: got the class {reward.__name__}, expected an object; pass {reward.__name__}(...)"


def _adapter_problems(model, peft_config) -> Iterator[str]:
    """Of one that is there, and of one that shall be."""
    if there := getattr(getattr(model, "transformer", None), "peft_config", None):
        got = f"got a pipeline with an adapter already, {' and '.join(map(repr, there))}, expected none"
        cure = "take it off (pipe.unload_lora_weights()), after pipe.fuse_lora() to begin with what it does"
        yield f"model: {got}; {cure}"
    if dropped := getattr(peft_config, "lora_dropout", 0):
        expected = "expected 0: each denoising step of a video, an evaluation's too, would be of another random model"
        yield f"peft_config: got lora_dropout={dropped}, {expected}; leave it out"
    if not isinstance(peft_config, LoraConfig):
        return
    if not peft_config.target_modules:
        yield f"peft_config: got no target_modules, expected names of layers; those of the settings are {ATTENTION}"
    if whole := peft_config.modules_to_save:
        yield f"peft_config: got modules_to_save={whole}, expected none, since LoRA files hold no modules; leave it out"
    if peft_config.bias != "none":
        yield f"peft_config: got bias={peft_config.bias!r}, expected 'none', as LoRA files hold no biases; leave it out"
    if isinstance(start := peft_config.init_lora_weights, str) and start not in KEEP_THE_BASE:
        expected = "expected one that leaves the base's weights as they are, for it is what a run is compared with"
        yield f"peft_config: got init_lora_weights={start!r}, {expected}; leave it out, or use {KEEP_THE_BASE[0]!r}"


def load_prompt_sets(inputs: Inputs) -> tuple[list[str], list[str]]:
    """The prompts to train on and those held out, [] for none, as handed over or as args name them."""
    args = inputs.args
    train = inputs.train_prompts or load_prompts(args.prompts, args.base_dir, args.num_train_prompts, args.seed)
    held_out = inputs.eval_prompts
    if held_out is None and args.eval_prompts:
        held_out = load_prompts(args.eval_prompts, args.base_dir, args.num_eval_prompts, args.eval_seed)
    return train, (held_out or [])[: args.num_eval_prompts]


def mix_rewards(opened: dict[str, Callable], count: int, args: RewardGradientConfig) -> RewardMix:
    """The leading `count` of the opened rewards, those that train, as args mix them."""
    return RewardMix(
        dict(list(opened.items())[:count]),
        args.reward_weights,
        args.normalise_rewards,
        args.reward_caps,
        args.reward_targets,
        args.balance_reward_gradients,
    )


def adapt(
    pipe: ContentVPipeline, peft_config: PeftConfig | None, args: RewardGradientConfig, layout: Layout
) -> tuple[Masters, dict[str, str]]:
    """Transformer and VAE on the layout's device, frozen, for evaluation, run as asked; the masters, what was chosen.

    Chosen, by setting, is what a setting left open, such as the attention kernel.
    """
    device = layout.device
    # The module's own `to`: diffusers' warns of formats that have to be kept, of which this VAE has none.
    torch.nn.Module.to(pipe.vae, device, base_dtype(args.vae_dtype)).requires_grad_(False).eval()
    if device.type == "cpu":  # faster there
        use_channels_last(pipe.vae)
    add_adapter(pipe.transformer, peft_config or lora_config(args), args.seed)
    with _reported_as_setting():
        chosen = set_up_blocks(pipe.transformer, Speed.of(args), device, layout.sequence_group)
    return Masters(pipe.transformer, args.ema_decay), chosen


@contextmanager
def _reported_as_setting() -> Iterator[None]:
    """Raise ConfigError where the device cannot run an option."""
    try:
        yield
    except UnsupportedOptionError as error:
        raise ConfigError([str(error)]) from None


def load_base(args: RewardGradientConfig, device: torch.device) -> ContentVPipeline:
    """The model that args name, on the device; on the CPU where its weights shall never be there all at once."""
    if args.sampling_weights == "float8":
        require_float8(device)  # before the model is loaded
    with _reported_as_setting():
        if args.attention_kernel not in ("auto", "default"):
            require_kernel(args.attention_kernel, device, base_dtype(args.dtype) or torch.bfloat16)
        if args.compile_blocks:
            require_compiler(device)
    one_by_one = args.stream_weights or args.base_bits or args.shard_base
    return load_pipeline(args.model, dtype=base_dtype(args.dtype), device="cpu" if one_by_one else device)


def latent_shape(pipe: ContentVPipeline, args: RewardGradientConfig) -> tuple[int, int, int, int]:
    """(C, T, H, W) of the latents of one video."""
    frames = (args.num_frames - 1) // pipe.vae_scale_factor_temporal + 1
    size = (args.height // pipe.vae_scale_factor, args.width // pipe.vae_scale_factor)
    return pipe.transformer.config.in_channels, frames, *size


def encode_and_release(
    pipe: ContentVPipeline, prompts: list[str], args: RewardGradientConfig, device: torch.device, release: bool
) -> PromptCache | None:
    """The prompts' embeddings, on the CPU; None for no prompts, as of a finished run that is resumed.

    release: the text encoders come to the device for this alone, and are on the CPU afterwards.
    """
    text, moved = None, TEXT_ENCODERS if release else ()
    if prompts:
        for name in moved:
            getattr(pipe, name).to(device)
        text = encode_prompts(pipe, prompts, args.negative_prompt, args.max_sequence_length)
    for name in moved:
        getattr(pipe, name).to("cpu")
    return text


def base_dtype(name: str) -> torch.dtype | None:
    """None, for "auto", leaves the choice to the loader."""
    return None if name == "auto" else getattr(torch, name)


def open_rewards(
    args: RewardGradientConfig,
    rewards: list[str | Callable] | None = None,
    prompts: list[str] | None = None,
    device: torch.device | None = None,
    pipe: ContentVPipeline | None = None,
) -> dict[str, Callable]:
    """Load the rewards, then the judges, frozen, on the device; probe those that train with three prompts.

    Args:
        args: settings as `check_config` returns them.
        rewards, prompts, pipe: objects in place of what args name.
        device: Default: that of args.

    Returns the rewards and judges by short name. Raises RewardError for a reward that cannot train,
    before the generator's weights are loaded.
    """
    device = device or local_device(args.device)
    prompts = prompts or load_prompts(args.prompts, args.base_dir, args.num_train_prompts, args.seed)
    trained = _load_rewards(args.reward_funcs if rewards is None else rewards, args, device)
    shape = (3, args.num_frames, args.height, args.width)
    info = {"fps": model_sizes(args.model, pipe)["sampling"]["fps"], "seed": args.seed, "step": 0}
    for name, reward in trained.items():
        probe(reward, shape, prompts[:3], device, name=name, info=info)
    return trained | _load_rewards(args.eval_reward_funcs, args, device)


def _load_rewards(rewards: list[str | Callable], args, device: torch.device) -> dict[str, Callable]:
    """Return rewards by short name, frozen: specs are loaded with their reward_kwargs, callables taken as they are."""
    loaded, kwargs = {}, args.reward_kwargs or {}
    for reward in rewards:
        name = short_name(reward)
        if isinstance(reward, str):
            reward = load_reward(reward, args.base_dir, **kwargs.get(name, {}))
        if isinstance(reward, torch.nn.Module):
            reward.to(device).requires_grad_(False).eval()
        loaded[name] = reward
    return loaded
