"""Setup of a trainer: arguments checked before anything is loaded; prompts, models, components."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig

from rewards import RewardMix, frames_needed, reward_name
from rlhf.adapter.lora import ATTENTION, add_adapter, lora_config, lora_settings
from rlhf.adapter.lora_file import IDENTITY_INITS, unsupported_fields
from rlhf.adapter.lora_weights import Lora
from rlhf.adapter.masters import MasterWeights
from rlhf.adapter.merge import apply_lora
from rlhf.checks import check_config
from rlhf.checks.method import PLAIN_LORA, read_initial
from rlhf.config import ConfigError, RewardGradientConfig, at_eval_size, is_distilled
from rlhf.distributed.layout import Layout
from rlhf.evaluation.held_out import EvalOptions, HeldOut, MakeVideos
from rlhf.evaluation.video_set import Video
from rlhf.execution.apply import (
    ExecutionOptions,
    UnsupportedOptionError,
    require_compiler,
    require_kernel,
    set_up_blocks,
)
from rlhf.execution.offload import HostMemory
from rlhf.generator.files import SamplingDefaults, model_sizes, resolve_model
from rlhf.generator.loading import Checkpoint, default_dtype
from rlhf.generator.pipeline import VideoPipeline
from rlhf.generator.text import PromptCache, encode_prompts
from rlhf.generator.wan_decoder import use_channels_last
from rlhf.method.decode import Decoder
from rlhf.method.options import is_offline, read_options
from rlhf.method.rollout import RolloutCache
from rlhf.method.velocity import Guidance, VelocityFields
from rlhf.prompts import as_prompts, load_prompts
from rlhf.prompts.videos import load_train_prompts, read_videos
from rlhf.run.folder import prompt_snapshot
from rlhf.run.trackers import Clip, show_samples
from rlhf.training.anchor_data import AnchorData, RealVideos
from rlhf.training.batches import Batches
from rlhf.training.callbacks import Notify
from rlhf.training.monitor import Guard, HeldOutMonitor
from rlhf.training.scoring import Scorer
from rlhf.types import row_of

PER_HOST_SETTINGS = (
    *("model", "device", "cpu_threads", "prompts", "eval_prompts", "base_dir", "output_dir", "initial_adapter"),
    "anchor_data",
)


@dataclasses.dataclass
class Inputs:
    """The trainer's arguments in one form, with the prompts that args name."""

    args: RewardGradientConfig
    pipe: VideoPipeline | None  # None for the model that args name
    rewards: list[str | Callable]
    train_prompts: list[str]
    eval_prompts: list[str]
    initial: Lora | None  # that the run starts from
    videos: list[Video]  # those of `anchor_data`


def check_inputs(
    model: str | Path | VideoPipeline | None,
    reward_funcs: str | Callable | list[str | Callable] | None,
    args: RewardGradientConfig | None,
    train_dataset: Iterable | None,
    eval_dataset: Iterable | None,
    peft_config: PeftConfig | None = None,
) -> Inputs:
    """Check the trainer's arguments and return them as `Inputs`. Raises one ConfigError for all."""
    args = args or RewardGradientConfig()
    problems = [*_wrong_types(model, reward_funcs, args, peft_config)]
    if problems := [*problems, *_adapter_problems(model, args, peft_config)]:
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
    if args.resume_from_checkpoint == "auto":  # there is nothing to go on from
        args.resume_from_checkpoint = None
    if is_offline(args) and train_prompts is not None:
        got, expected = "got prompts of a run that is offline", "expected none: it trains on captions"
        raise ConfigError([f"train_dataset: {got}, {expected} of {args.anchor_data}; leave it out"])
    train_prompts = train_prompts or load_train_prompts(args)
    if train_dataset is not None:
        args.prompts = prompt_snapshot(args, "prompts")
    if eval_prompts is not None:
        args.eval_prompts = prompt_snapshot(args, "eval_prompts")
    elif args.eval_prompts:
        eval_prompts = load_prompts(args.eval_prompts, args.base_dir, args.num_eval_prompts, args.eval_seed)
    initial = read_initial(args, model_sizes(args.model, pipe)["transformer"])
    held_out = (eval_prompts or [])[: args.num_eval_prompts]
    return Inputs(args, pipe, rewards, train_prompts, held_out, initial, read_videos(args))


def _wrong_types(model, reward_funcs, args, peft_config) -> Iterator[str]:
    """Yield a problem for each trainer argument of a wrong type."""
    expected = {
        "model": (model, str | Path | VideoPipeline, "a name, a path or a pipeline; rlhf.generator.loading"),
        "args": (args, RewardGradientConfig, "a RewardGradientConfig; rlhf.config"),
        "peft_config": (peft_config, LoraConfig, "a LoraConfig, whose files diffusers reads; peft"),
    }
    for name, (given, kind, source) in expected.items():
        if given is not None and not isinstance(given, kind):
            yield f"{name}: got a {type(given).__name__}, expected {source} has it"
    if isinstance(reward_funcs, dict):
        cure = "give each object a `name`, and each spec one as in 'name=spec'"
        yield f"reward_funcs: got a dict, expected a list; {cure}"
    for reward in reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]:
        if isinstance(reward, type):
            yield f"reward_funcs: got the class {reward.__name__}, expected an object; pass {reward.__name__}(...)"


def _adapter_problems(model, args, peft_config) -> Iterator[str]:
    """Yield the problem of a model that has an adapter already, and wrong fields of peft_config."""
    if getattr(args, "initial_adapter", None) and (
        merged := getattr(getattr(model, "transformer", None), "initial_adapter", None)
    ):
        got = f"got a pipeline into which a run has merged {merged} already, expected one without"
        yield f"initial_adapter: {got}; load the pipeline again, or leave initial_adapter out"
    if there := getattr(getattr(model, "transformer", None), "peft_config", None):
        got = f"got a pipeline with an adapter already, {' and '.join(map(repr, there))}, expected none"
        cure = "take it off (pipe.unload_lora_weights()), after pipe.fuse_lora() to begin with what it does"
        yield f"model: {got}; {cure}"
    if dropped := getattr(peft_config, "lora_dropout", 0):
        expected = "expected 0: each denoising step of a video, an evaluation's too, would be of another random model"
        yield f"peft_config: got lora_dropout={dropped}, {expected}; leave it out"
    if not isinstance(peft_config, LoraConfig):
        return
    if peft_config.use_dora and isinstance(args, RewardGradientConfig):
        yield from _dora_problems(args)
    if not peft_config.target_modules:
        yield f"peft_config: got no target_modules, expected names of layers; those of the settings are {ATTENTION}"
    for name, value in unsupported_fields(peft_config.to_dict()).items():
        yield f"peft_config: got {name}={value!r}, expected its default: a run trains LoRA alone; leave it out"
    if isinstance(start := peft_config.init_lora_weights, str) and start not in IDENTITY_INITS:
        expected = "expected one that leaves the base's weights as they are, for it is what a run is compared with"
        yield f"peft_config: got init_lora_weights={start!r}, {expected}; leave it out, or use {IDENTITY_INITS[0]!r}"


def _dora_problems(args: RewardGradientConfig) -> Iterator[str]:
    """Yield the settings that a DoRA of peft_config does not work with."""
    if args.weight_decay:
        expected = "expected 0: it would pull the model's own magnitudes to 0"
        yield f"weight_decay: got {args.weight_decay} with use_dora, {expected}; hold them with drift_weight instead"
    if args.initial_adapter:
        yield f"initial_adapter: got use_dora in peft_config, {PLAIN_LORA}"


def require_same_run(
    layout: Layout, prompts: list[str], args: RewardGradientConfig, videos: Iterable[Video] = ()
) -> None:
    """Raise ConfigError on every process if prompts, videos or settings differ between them."""
    settings = [value for name, value in vars(args).items() if name not in PER_HOST_SETTINGS]
    captions = [row_of(video.prompt) for video in videos]
    layout.require_same(prompts=[*map(row_of, prompts)], anchor_data=captions, settings=settings)


def prepare_model(
    pipe: VideoPipeline,
    peft_config: PeftConfig | None,
    args: RewardGradientConfig,
    layout: Layout,
    initial: Lora | None = None,
) -> tuple[MasterWeights, dict[str, str]]:
    """Freeze the models, add the adapter, set up execution; return master weights and choices.

    Choices are what settings left open, by setting, such as the attention kernel. initial: the LoRA
    that is merged into the base first, so that the base is base and LoRA from there on.
    """
    device = layout.device
    # The module's own `to`: diffusers' warns of formats to keep, of which this VAE has none.
    torch.nn.Module.to(pipe.vae, device, base_dtype(args.vae_dtype)).requires_grad_(False).eval()
    if device.type == "cpu":
        use_channels_last(pipe.vae)  # a fifth faster
    if initial:
        layout.accelerator.print(f"{args.initial_adapter}: {apply_lora(pipe.transformer, initial, merge=True)}")
        pipe.transformer.initial_adapter = args.initial_adapter
    add_adapter(pipe.transformer, peft_config or lora_config(args), args.seed)
    with _as_config_error():
        choices = set_up_blocks(pipe.transformer, ExecutionOptions.from_settings(args), device, layout.sequence_group)
    distilled = is_distilled(vars(args)) or bool(initial and initial.distilled and args.guidance_scale <= 1)
    old_decay = getattr(read_options(args.method, args.method_kwargs), "old_decay", None)
    return MasterWeights(pipe.transformer, args.ema_decay, initial, distilled, old_decay), choices


@contextmanager
def _as_config_error() -> Iterator[None]:
    """Raise ConfigError where the device cannot run an option."""
    try:
        yield
    except UnsupportedOptionError as error:
        raise ConfigError([str(error)]) from None


def describe_precision(args: RewardGradientConfig, pipe: VideoPipeline | None) -> str:
    """Return the number formats of the base and the adapter, in words."""
    dtype = args.dtype if pipe is None else pipe.transformer.dtype
    if dtype == "auto" and isinstance(folder := resolve_model(args.model), Path):
        dtype = default_dtype(folder)
    few_bits = f" with weights of {args.base_bits} bits" * bool(args.base_bits)
    return f"base in {str(dtype).removeprefix('torch.')}{few_bits}, adapter in float32"


def find_base(args: RewardGradientConfig, device: torch.device) -> Checkpoint:
    """Return the checkpoint that args name. Raises ConfigError for what the device cannot run."""
    with _as_config_error():
        if args.attention_kernel not in ("auto", "default"):
            require_kernel(args.attention_kernel, device, base_dtype(args.dtype) or torch.bfloat16)
        if args.compile_blocks:
            require_compiler(device)
    return Checkpoint.find(args.model, base_dtype(args.dtype))


def load_base(base: Checkpoint, pipe: VideoPipeline, args: RewardGradientConfig, device: torch.device) -> None:
    """Load transformer and VAE, onto the CPU if the transformer is to move weight by weight."""
    base.load_generator(pipe)
    if not (args.stream_weights or args.base_bits or args.shard_base):
        pipe.transformer.to(device)


def make_fields(
    pipe: VideoPipeline, masters: MasterWeights, args: RewardGradientConfig, layout: Layout
) -> VelocityFields:
    """Return the velocity fields of a run."""
    how = Guidance.from_settings(args), args.stepwise_backward, layout.guidance_group
    return VelocityFields(pipe.transformer, masters, *how)


def make_decoder(pipe: VideoPipeline, rewards: RewardMix, args: RewardGradientConfig, device: torch.device) -> Decoder:
    """Return the decoder of the frames that any reward asks for, if one does."""
    return Decoder(
        pipe.vae,
        frames=max(frames_needed(reward, args.num_frames) for reward in rewards.rewards.values()),
        window=args.decode_window,
        seed=args.seed,
        chunk=args.decode_chunk,
        checkpoint=args.decode_checkpoint,
        caches=HostMemory(device) if args.decode_caches == "host" else None,
    )


def make_scorer(pipe: VideoPipeline, rewards: RewardMix, args: RewardGradientConfig, layout: Layout) -> Scorer:
    """Return what scores the samples of a run's steps."""
    decode, options = make_decoder(pipe, rewards, args, layout.device), read_options(args.method, args.method_kwargs)
    return Scorer(rewards, decode, layout, args.method, options, pipe.sampling.fps, args.seed)


def make_batches(prompts: list[str], pipe: VideoPipeline, args: RewardGradientConfig, layout: Layout) -> Batches:
    """Return the source of each step's prompts and noise; pipe gives only the latent shape."""
    return Batches(
        prompts,
        latent_shape(pipe, args),
        layout,
        seed=args.seed,
        size=args.per_device_train_batch_size,
        per_step=args.gradient_accumulation_steps,
        reuse=args.rollout_reuse,
        max_steps=args.max_steps,
        group_size=getattr(read_options(args.method, args.method_kwargs), "group_size", 1),
    )


def make_anchor_data(
    videos: list[Video], pipe: VideoPipeline, args: RewardGradientConfig, layout: Layout
) -> AnchorData:
    """Return the real videos of a run, not encoded yet; an empty one without `anchor_data`."""
    if videos:
        captions = ", whose captions are the prompts of this run" if is_offline(args) else ""
        layout.accelerator.print(f"anchor_data: {len(videos)} videos of {args.anchor_data}{captions}")
    options = read_options(args.method, args.method_kwargs)
    return AnchorData(videos, latent_shape(pipe, args), pipe, args, options, layout)


def make_rollouts(args: RewardGradientConfig, data: AnchorData, batches: Batches) -> RolloutCache:
    """Return what windows start from: rollouts, or the real videos of an offline run."""
    return RealVideos(data, batches) if is_offline(args) else RolloutCache(args.rollout_reuse)


def make_held_out(
    make_videos: MakeVideos,
    judges: dict[str, Callable],
    prompts: list[str],
    pipe: VideoPipeline,
    args: RewardGradientConfig,
    layout: Layout,
) -> HeldOut:
    """Return the held-out prompts of a run, evaluated by its settings and shown in its trackers."""

    def show(step: int, clips: list[Clip]) -> None:
        show_samples(layout.accelerator, step, clips)

    shape, fps, folder = latent_shape(pipe, at_eval_size(args)), pipe.sampling.fps, Path(args.output_dir)
    return HeldOut(make_videos, judges, prompts, shape, fps, EvalOptions.from_settings(args), folder, layout, show)


def make_monitor(
    held_out: HeldOut, rewards: RewardMix, masters: MasterWeights, notify: Notify, args: RewardGradientConfig
) -> HeldOutMonitor:
    """Return the monitor of a run's held-out prompts, with its guard."""
    weights = {name: weight for name, weight in rewards.weights.items() if weight}
    guard, resume_from = Guard.from_settings(args), args.resume_from_checkpoint
    return HeldOutMonitor(held_out, weights, masters, notify, guard, resume_from, rewards.targets)


def latent_shape(pipe: VideoPipeline, video: RewardGradientConfig | SamplingDefaults) -> tuple[int, int, int, int]:
    """Return (C, T, H, W) of the latents of one video."""
    frames = (video.num_frames - 1) // pipe.vae_scale_factor_temporal + 1
    size = (video.height // pipe.vae_scale_factor, video.width // pipe.vae_scale_factor)
    return pipe.transformer.config.in_channels, frames, *size


def encode(
    pipe: VideoPipeline, prompts: list[str], args: RewardGradientConfig, device: torch.device, base: Checkpoint | None
) -> PromptCache | None:
    """Encode the prompts; None for none.

    base: whose text encoders are loaded for this alone, one after another; None: the pipeline has
    its own.
    """
    if not prompts:
        return None
    lend = nullcontext if base is None else lambda name: base.lend_encoder(pipe, name, device)
    return encode_prompts(pipe, prompts, args.negative_prompt, args.max_sequence_length, lend_encoder=lend)


def base_dtype(name: str) -> torch.dtype | None:
    """Return the dtype of a setting; None, for "auto", leaves the choice to the loader."""
    return None if name == "auto" else getattr(torch, name)
