"""Setup of a trainer: arguments checked before anything is loaded; prompts, rewards, models."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig

from rewards import RewardMix, frames_needed, load_reward, probe, reward_name
from rlhf.adapter.lora import ATTENTION, add_adapter, lora_config, lora_settings
from rlhf.adapter.masters import MasterWeights
from rlhf.adapter.float8 import require_float8
from rlhf.checks import check_config
from rlhf.checks.rewards import short_name
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.contentv.files import model_sizes
from rlhf.contentv.loading import TEXT_ENCODERS, load_pipeline
from rlhf.contentv.pipeline import ContentVPipeline
from rlhf.contentv.text import PromptCache, encode_prompts
from rlhf.contentv.wan_decoder import use_channels_last
from rlhf.device import local_device
from rlhf.distributed.layout import Layout
from rlhf.evaluation.held_out import EvalOptions, HeldOut, MakeVideos
from rlhf.execution.apply import (
    ExecutionOptions,
    UnsupportedOptionError,
    require_compiler,
    require_kernel,
    set_up_blocks,
)
from rlhf.execution.offload import HostMemory
from rlhf.method.decode import Decoder
from rlhf.method.velocity import Guidance, VelocityFields
from rlhf.prompts import as_prompts, load_prompts
from rlhf.run.folder import prompt_snapshot
from rlhf.run.trackers import Clip
from rlhf.training.batches import Batches

IDENTITY_INITS = ("gaussian", "orthogonal")  # values of init_lora_weights that change nothing
PER_HOST_SETTINGS = ("model", "device", "cpu_threads", "prompts", "eval_prompts", "base_dir", "output_dir")


@dataclasses.dataclass
class Inputs:
    """The trainer's arguments in one form; None for what args name and is not loaded yet."""

    args: RewardGradientConfig
    pipe: ContentVPipeline | None
    rewards: list[str | Callable]
    train_prompts: list[str] | None
    eval_prompts: list[str] | None


def check_inputs(
    model: str | Path | ContentVPipeline | None,
    reward_funcs: str | Callable | list[str | Callable] | None,
    args: RewardGradientConfig | None,
    train_dataset: Iterable | None,
    eval_dataset: Iterable | None,
    peft_config: PeftConfig | None = None,
) -> Inputs:
    """Return the trainer's arguments in one form. Raises ConfigError with all problems at once."""
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
    args = dataclasses.replace(args, **lora_settings(peft_config))  # as a checkpoint's must be
    args = check_config(args, pipe, rewards, train_prompts, eval_prompts)
    passed = {"prompts": train_prompts, "eval_prompts": eval_prompts}
    snapshots = {name: prompt_snapshot(args, name) for name, prompts in passed.items() if prompts is not None}
    args = dataclasses.replace(args, **snapshots)
    return Inputs(args, pipe, rewards, train_prompts, eval_prompts)


def _wrong_types(model, reward_funcs, args, peft_config) -> Iterator[str]:
    expected = {
        "model": (model, str | Path | ContentVPipeline, "a name, a path or a ContentVPipeline; rlhf.contentv.loading"),
        "args": (args, RewardGradientConfig, "a RewardGradientConfig; rlhf.config"),
        "peft_config": (peft_config, LoraConfig, "a LoraConfig, whose files diffusers reads; peft"),
    }
    for name, (given, kind, source) in expected.items():
        if given is not None and not isinstance(given, kind):
            yield f"{name}: got a {type(given).__name__}, expected {source} has it"
    for reward in reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]:
        if isinstance(reward, type):
            yield f"reward_funcs: got the class {reward.__name__}, expected an object; pass {reward.__name__}(...)"


def _adapter_problems(model, peft_config) -> Iterator[str]:
    """Yield the problems of an adapter that the model has, and of peft_config's."""
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
        yield f"peft_config: got modules_to_save={whole}, expected none: a run trains LoRA alone; leave it out"
    if peft_config.bias != "none":
        yield f"peft_config: got bias={peft_config.bias!r}, expected 'none', as LoRA files hold no biases; leave it out"
    if isinstance(start := peft_config.init_lora_weights, str) and start not in IDENTITY_INITS:
        expected = "expected one that leaves the base's weights as they are, for it is what a run is compared with"
        yield f"peft_config: got init_lora_weights={start!r}, {expected}; leave it out, or use {IDENTITY_INITS[0]!r}"


def load_prompt_sets(inputs: Inputs) -> tuple[list[str], list[str]]:
    """Return training and held-out prompts ([] for none), as passed or as args name them."""
    args = inputs.args
    train = inputs.train_prompts or load_prompts(args.prompts, args.base_dir, args.num_train_prompts, args.seed)
    held_out = inputs.eval_prompts
    if held_out is None and args.eval_prompts:
        held_out = load_prompts(args.eval_prompts, args.base_dir, args.num_eval_prompts, args.eval_seed)
    return train, (held_out or [])[: args.num_eval_prompts]


def mix_rewards(opened: dict[str, Callable], count: int, args: RewardGradientConfig) -> RewardMix:
    """Return the mix of the leading `count` opened rewards, the trained ones."""
    return RewardMix(
        dict(list(opened.items())[:count]),
        args.reward_weights,
        args.normalise_rewards,
        args.reward_caps,
        args.reward_targets,
        args.balance_reward_gradients,
    )


def require_same_run(layout: Layout, prompts: list[str], args: RewardGradientConfig) -> None:
    """Raise ConfigError on every process if prompts or settings differ between processes."""
    settings = [value for name, value in vars(args).items() if name not in PER_HOST_SETTINGS]
    layout.require_same(prompts=prompts, settings=settings)


def prepare_model(
    pipe: ContentVPipeline, peft_config: PeftConfig | None, args: RewardGradientConfig, layout: Layout
) -> tuple[MasterWeights, dict[str, str]]:
    """Freeze the models, add the adapter, set up execution; return master weights and choices.

    Choices are what settings left open, by setting, such as the attention kernel.
    """
    device = layout.device
    # The module's own `to`: diffusers' warns of formats to keep, of which this VAE has none.
    torch.nn.Module.to(pipe.vae, device, base_dtype(args.vae_dtype)).requires_grad_(False).eval()
    if device.type == "cpu":
        use_channels_last(pipe.vae)  # a fifth faster
    add_adapter(pipe.transformer, peft_config or lora_config(args), args.seed)
    with _reported_as_setting():
        choices = set_up_blocks(pipe.transformer, ExecutionOptions.from_settings(args), device, layout.sequence_group)
    return MasterWeights(pipe.transformer, args.ema_decay), choices


@contextmanager
def _reported_as_setting() -> Iterator[None]:
    """Raise ConfigError where the device cannot run an option."""
    try:
        yield
    except UnsupportedOptionError as error:
        raise ConfigError([str(error)]) from None


def load_base(args: RewardGradientConfig, device: torch.device) -> ContentVPipeline:
    """Load the model that args name, onto the CPU if its weights are to move one by one later."""
    if args.sampling_weights == "float8":
        require_float8(device)  # before the model is loaded
    with _reported_as_setting():
        if args.attention_kernel not in ("auto", "default"):
            require_kernel(args.attention_kernel, device, base_dtype(args.dtype) or torch.bfloat16)
        if args.compile_blocks:
            require_compiler(device)
    one_by_one = args.stream_weights or args.base_bits or args.shard_base
    target = "cpu" if one_by_one else device
    return load_pipeline(args.model, dtype=base_dtype(args.dtype), device=target)


def make_fields(
    pipe: ContentVPipeline, masters: MasterWeights, args: RewardGradientConfig, layout: Layout
) -> VelocityFields:
    """Return the velocity fields of a run."""
    return VelocityFields(
        pipe.transformer,
        masters,
        Guidance.of(args),
        checkpoint_steps=args.stepwise_backward,
        sampling_weights=args.sampling_weights,
        guidance_group=layout.guidance_group,
    )


def make_decoder(
    pipe: ContentVPipeline, rewards: RewardMix, args: RewardGradientConfig, device: torch.device
) -> Decoder:
    """Return the decoder of the frames that any reward asks for."""
    return Decoder(
        pipe.vae,
        frames=max(frames_needed(reward, args.num_frames) for reward in rewards.rewards.values()),
        window=args.decode_window,
        seed=args.seed,
        chunk=args.decode_chunk,
        checkpoint=args.decode_checkpoint,
        caches=HostMemory(device) if args.decode_caches == "host" else None,
    )


def make_batches(prompts: list[str], pipe: ContentVPipeline, args: RewardGradientConfig, layout: Layout) -> Batches:
    """Return the batches of a run over its training prompts."""
    return Batches(
        prompts,
        latent_shape(pipe, args),
        layout,
        seed=args.seed,
        size=args.per_device_train_batch_size,
        per_step=args.gradient_accumulation_steps,
        reuse=args.rollout_reuse,
        max_steps=args.max_steps,
    )


def make_held_out(
    make_videos: MakeVideos,
    judges: dict[str, Callable],
    prompts: list[str],
    pipe: ContentVPipeline,
    args: RewardGradientConfig,
    layout: Layout,
    show: Callable[[int, list[Clip]], None],
) -> HeldOut:
    """Return the held-out prompts of a run, evaluated by its settings."""
    shape, fps, folder = latent_shape(pipe, args), pipe.sampling.fps, Path(args.output_dir)
    return HeldOut(make_videos, judges, prompts, shape, fps, EvalOptions.of(args), folder, layout, show)


def latent_shape(pipe: ContentVPipeline, args: RewardGradientConfig) -> tuple[int, int, int, int]:
    """Return (C, T, H, W) of the latents of one video."""
    frames = (args.num_frames - 1) // pipe.vae_scale_factor_temporal + 1
    size = (args.height // pipe.vae_scale_factor, args.width // pipe.vae_scale_factor)
    return pipe.transformer.config.in_channels, frames, *size


def encode_and_release(
    pipe: ContentVPipeline, prompts: list[str], args: RewardGradientConfig, device: torch.device, release: bool
) -> PromptCache | None:
    """Return the prompts' embeddings, on the CPU; None for no prompts, as of a finished run.

    release: whether the text encoders move to the device for this alone, and to the CPU afterwards.
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
    """Return the dtype of a setting; None, for "auto", leaves the choice to the loader."""
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
