"""The settings of a run: one dataclass, read from a YAML file with flat keys, each also a flag.

Names follow TRL and transformers where these have a word for a thing. Type, choices and range of a
setting stand beside its field and nowhere else. `rlhf.checks` holds the checks between settings.
"""

import dataclasses
import difflib
import functools
import math
import os
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from rlhf.config.coerce import coerce_all
from rlhf.config.older import hint

SAMPLING_KEYS = (
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
    "negative_prompt",
    "max_sequence_length",
)
VIDEO_SIZE = ("height", "width", "num_frames")
Method = Literal[
    "draft_k",
    "draft_lv",
    "alignprop",
    "uniform",
    "listed",
    "drtune",
    "refl",
    "srpo",
    "prfl",
    "leap_align",
    "adjoint_matching",
    "nft",
    "flow_grpo",
]
GuidanceGradient = Literal["full", "text", "none", "distill"]
METHODS, GUIDANCE_GRADIENTS = typing.get_args(Method), typing.get_args(GuidanceGradient)
RANGE_WORDS = {"least": "at least", "above": "more than", "most": "at most", "below": "less than"}
LARGEST = 1e9  # of a number whose setting has no limit of its own


class ConfigError(ValueError):
    """Everything that is wrong with the settings, found at once."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        noun = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"The settings have {noun}:\n{lines}")

    def __reduce__(self):
        """Return how a copy is made, in another process too."""
        return type(self), (self.problems,)


def setting(default: Any, help: str, **limits: float):
    """Return a dataclass field with a setting's default, help text and limits.

    Args:
        default: the default; a list is copied.
        help: what the setting does, its unit, and the meaning of None.
        limits: the range: `least` and `most` (inclusive), `above` and `below` (exclusive), by
            default `LARGEST` on both sides. None is always in it; of a list or mapping, each number
            has to be.
    """
    bounds = limits | ({} if limits.keys() & {"least", "above"} else {"least": -LARGEST})
    bounds |= {} if limits.keys() & {"most", "below"} else {"most": LARGEST}
    metadata = {"help": help, "limits": limits, "bounds": bounds}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def range_text(f: dataclasses.Field) -> str:
    """Return the range of a setting in words, such as "at least 0, less than 1"; "" for none."""
    return _limits_text(f.metadata["limits"])


def _limits_text(limits: dict[str, float]) -> str:
    """Return limits in words, such as "at least 0, less than 1"."""
    return ", ".join(f"{RANGE_WORDS[name]} {_limit_text(limit)}" for name, limit in limits.items())


def _limit_text(value: float) -> str:
    """Return a limit as text, 2**64 as a power."""
    return {2**64: "2**64", -(2**63): "-2**63"}.get(value, f"{value:g}")


def range_problems(values: Any, where: str = "") -> Iterator[str]:
    """Yield what is out of range in a dataclass instance whose fields `setting` made."""
    for f in dataclasses.fields(values):
        given, bounds = getattr(values, f.name), f.metadata["bounds"]
        pairs = given.items() if isinstance(given, dict) else [("", v) for v in _as_list(given)]
        for key, value in pairs:
            if type(value) in (int, float) and not _in_range(value, **bounds):
                got = f"got {value}" + (f" for {key!r}" if key else "")
                yield f"{where}{f.name}: {got}, expected {_limits_text(bounds)}; correct its value"


def _as_list(value: Any) -> list:
    """Return a list unchanged, else a list of the value."""
    return value if isinstance(value, list) else [value]


def _in_range(value, least=-math.inf, above=-math.inf, most=math.inf, below=math.inf) -> bool:
    """Return whether the value is within all limits, as of `setting`."""
    return least <= value <= most and above < value < below


def coerce_settings(values: Any) -> None:
    """Cast the fields of a dataclass instance to their types, in place.

    Raises ConfigError for those that cannot be cast, together with those out of range.
    """
    right, problems = coerce_all(vars(values), typing.get_type_hints(type(values)))
    vars(values).update(dict.fromkeys(vars(values)) | right)
    if problems:
        raise ConfigError([*problems, *range_problems(values)])


def _explain_keywords(cls: type) -> type:
    """Let the settings raise ConfigError for a keyword that is none of them, as for a flag."""
    init = cls.__init__

    @functools.wraps(init)  # keeps the signature
    def explained(self, *values, **settings):
        if unknown := [unknown_setting(name) for name in settings if name not in field_names()]:
            raise ConfigError(unknown)
        init(self, *values, **settings)

    cls.__init__ = explained
    return cls


@_explain_keywords
@dataclass
class RewardGradientConfig:
    """Settings of `RewardGradientTrainer`. The help of each field gives its unit and its source."""

    # Model and prompts
    model: str = setting("nano", "The generator: nano (embedded), a folder in diffusers layout, or a hub id.")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "Number format of the frozen transformer and text encoders. auto: bfloat16 for a transformer "
        "of more than 2 GiB, else float32. Latents, scores and trained weights are always float32.",
    )
    device: str | None = setting(None, "Kind of device, such as cpu. Default: the accelerator.")
    cpu_threads: int | None = setting(
        None, "Threads of a process on a CPU. Default: OMP_NUM_THREADS, else its cores.", least=1, most=1024
    )
    prompts: str = setting(
        "nano_train",
        "Training prompts: a text file of one prompt a line (# is a comment), a .csv, .tsv, .json or "
        ".jsonl file of rows with a prompt, or the built-in set nano_train. Paths are relative to the "
        "config file.",
    )
    eval_prompts: str | None = setting(
        "nano_held_out",
        "Held-out prompts, in the forms of `prompts`; built-in set: nano_held_out. none: no "
        "evaluation and no sample videos.",
    )
    base_dir: str | None = setting(
        None, "Folder of relative paths of model, adapter, prompts and rewards. Default: the config file's."
    )

    # Rewards
    reward_funcs: list[str] = setting(
        ["nano_preference"],
        "Rewards to train on: built-in names, package.module:Class or file.py:Class (which is run). "
        "name=spec gives one another name; in YAML also {name: {spec: spec, argument: value}}.",
    )
    reward_weights: list[float] | None = setting(None, "Weights of reward_funcs. Default: 1 each.")
    reward_kwargs: dict[str, dict] | str | None = setting(
        None,
        "Arguments of rewards, {name: {argument: value}}; as a flag, in quotes. Paths are relative to the config file.",
    )
    reward_timeout: float = setting(
        300.0,
        "Seconds that a reward of your own may take to import, to be constructed, and to answer the first "
        "calls before the run; later calls have no limit.",
        above=0,
        most=86400,
    )
    normalise_rewards: bool = setting(
        True,
        "Weigh (score - mean) / std of each reward whose typical mean and spread are stated or "
        "measured, instead of the raw score.",
    )
    calibrate_rewards: int = setting(
        0,
        "Videos of the base model on which each reward's mean and spread are measured before the "
        "first step. 0: use those that the reward states.",
        least=0,
    )
    reward_caps: dict[str, float] | str | None = setting(None, "Scores above which nothing is learnt, {name: cap}.")
    reward_targets: dict[str, float] | str | None = setting(
        None, "Raw scores to aim at from both sides, {name: target}."
    )
    balance_reward_gradients: bool = setting(
        False, "Scale each reward's pixel gradient to length 1 before it is weighted."
    )
    reward_mix: Literal["sum", "min"] = setting(
        "sum", "Total of several rewards: their weighted sum, or the lowest of them, each times its weight."
    )
    eval_reward_funcs: list[str] = setting([], "Rewards that only evaluate; they need no gradient.")

    # Sampling.
    height: int | None = setting(None, "Video height in pixels. Default: the model's.", least=1, most=16384)
    width: int | None = setting(None, "Video width in pixels. Default: the model's.", least=1, most=16384)
    num_frames: int | None = setting(None, "Frames of a video, 4k+1. Default: the model's.", least=1, most=10000)
    num_inference_steps: int | None = setting(None, "Denoising steps N. Default: the model's.", least=1, most=1000)
    guidance_scale: float | None = setting(
        None,
        "Classifier-free guidance g in v_neg + g (v_text - v_neg). 1 or less: no guidance. Default: the model's.",
        above=0,
        most=1000,
    )
    negative_prompt: str | None = setting(
        None, "Prompt of the negative branch of guidance, where a prompt's row has none. Default: the model's."
    )
    max_sequence_length: int | None = setting(
        None, "Tokens of the T5 text encoder. Default: the model's.", least=1, most=512
    )

    # The gradient. docs/methods.md compares the methods.
    method: Literal[Method, "auto"] = setting(
        "draft_k",
        "Which denoising steps carry the reward's gradient. auto: draft_k, or nft if a trained reward has no gradient.",
    )
    num_grad_steps: int = setting(
        1,
        "K: draft_k (arXiv 2309.17400) takes the gradient through the last K of N denoising steps, "
        "alignprop through the last k drawn from 1 to K, uniform and drtune through K evenly "
        "spaced ones. The others do not read it.",
        least=1,
    )
    method_kwargs: dict[str, Any] | str | None = setting(
        None,
        "Options of the method, {option: value}; as a flag, the same in quotes. docs/settings.md "
        "lists the options of each method.",
    )
    guidance_gradient: GuidanceGradient = setting(
        "full",
        "Part of guidance with gradient: full (exact), text (the text branch), none (the "
        "unguided velocity), or distill (sample without guidance; drift_weight teaches it to the "
        "adapter).",
    )
    drift_weight: float = setting(
        0.0, "Weight of the drift from the base, in nats per element of the latents.", least=0
    )
    anchor_steps: int = setting(
        0,
        "Every n-th optimizer step uses no reward and minimises the drift on samples of the base: "
        "KL(base || tuned). 0: none.",
        least=0,
    )
    anchor_data: str | None = setting(
        None,
        "Folder of real videos with captions, in the forms of eval/score.py, of this run's size and the model's frame "
        "rate; longer ones are cut. Read by anchor_data_steps and by srpo's offline, in method_kwargs.",
    )

    # Speed and memory at the same gradient. docs/performance.md has the cost of each.
    gradient_checkpointing: bool = setting(False, "Recompute blocks in the backward pass.")
    keep_attention: bool = setting(
        False, "With gradient_checkpointing: store the output of attention, recompute the rest."
    )
    stepwise_backward: bool = setting(
        False,
        "Back-propagate one denoising step and guidance branch at a time: memory of one, for "
        "one more forward pass of each.",
    )
    guidance_together: bool = setting(False, "Run both branches of guidance as one batch.")
    attention_kernel: Literal["auto", "default", "cudnn", "flash", "efficient"] = setting(
        "auto", "auto: on a CUDA device the fastest, by benchmark. default: PyTorch's choice."
    )
    compile_blocks: bool = setting(False, "Compile parts of a block, once for all blocks.")
    offload_activations: bool = setting(
        False, "With gradient_checkpointing: keep the stored inputs of blocks in host memory."
    )
    stream_weights: bool = setting(
        False, "With gradient_checkpointing: keep frozen blocks on the host, copied in singly."
    )
    decode_chunk: int | None = setting(
        None, "Latent frames decoded at a time; same video. Default: all at once.", least=1
    )
    decode_checkpoint: bool = setting(False, "Recompute each decoded chunk in the backward pass.")
    decode_caches: Literal["keep", "host"] = setting(
        "keep", "With decode_checkpoint, place of the caches between chunks: keep (device) or host."
    )

    # Several devices. The rest is data parallel. docs/scaling.md says which layout when.
    guidance_parallel: Literal[1, 2] = setting(1, "2: each branch of guidance has its own process.")
    sequence_parallel: int = setting(
        1, "Processes over which a video's tokens are divided (arXiv 2309.14509).", least=1
    )
    shard_base: bool = setting(False, "Divide the frozen transformer over all processes (FSDP2).")
    ddp_timeout: int = setting(1800, "Seconds that a process waits for the others.", least=1, most=10**7)

    # Cheaper, but not exact. docs/performance.md has cost and effect of each.
    base_bits: Literal[4] | None = setting(
        None, "4: round the frozen base to 4 bits (bitsandbytes). Default: not rounded."
    )
    vae_dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "float32", "Number format of the VAE. auto: bfloat16 on a CPU that has instructions for it, else float32."
    )
    decode_window: int | None = setting(
        None,
        "Consecutive frames scored, from a drawn one on; earlier latents get no gradient. Default: all.",
        least=1,
    )
    prefix_steps: int | None = setting(
        None, "Most no-grad steps before the window, while training. Default: all.", least=1
    )
    rollout_reuse: int = setting(
        1, "Consecutive optimizer steps that start their window from the same rollout.", least=1
    )

    # The adapter, by peft
    lora_rank: int = setting(16, "Rank r of the LoRA adapters (arXiv 2106.09685).", least=1, most=4096)
    lora_alpha: int | None = setting(
        None, "LoRA alpha: the adapter is scaled by alpha / r. Default: the rank.", least=1, most=65536
    )
    lora_target_modules: list[str] | None = setting(
        None,
        "Ends of names of the adapted layers; or attention (the eight projections) or all-linear (these and the "
        "feed-forward layers). Default: attention.",
    )
    initial_adapter: str | None = setting(
        None,
        "LoRA that the run starts from: a file, a folder such as RUN/adapter, or a hub id. It is "
        "merged into the frozen base, which drift and gains are then measured from.",
    )
    ema_decay: float = setting(
        0.0,
        "Decay of an average of the trained weights, evaluated and saved in their place. 0: none.",
        least=0,
        below=1,
    )

    # The optimizer, AdamW
    learning_rate: float = setting(1e-4, "Peak learning rate.", least=0, most=10)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = setting(
        "constant", "After the warm-up: constant, or down to 0 at max_steps, linear or along half a cosine."
    )
    warmup_steps: int = setting(0, "Optimizer steps of the linear warm-up from 0.", least=0)
    weight_decay: float = setting(0.0, "Decoupled weight decay, towards an adapter of 0.", least=0, most=100)
    adam_beta1: float = setting(0.9, "Decay of the averaged gradient.", least=0, below=1)
    adam_beta2: float = setting(0.999, "Decay of the averaged squared gradient.", least=0, below=1)
    adam_epsilon: float = setting(
        1e-8,
        "Added to the root of the averaged squared gradient. Not 0: a new adapter's A has no "
        "gradient, and 0 / 0 is no number.",
        above=0,
        most=1,
    )
    max_grad_norm: float = setting(
        1.0, "Largest norm of the gradient; a longer one is scaled down. 0: no limit.", least=0
    )
    per_device_train_batch_size: int = setting(1, "Videos sampled at a time.", least=1, most=10000)
    gradient_accumulation_steps: int = setting(1, "Batches per optimizer step.", least=1)
    max_steps: int = setting(100, "Optimizer steps of the whole run, resumed parts too.", least=1)
    seed: int = setting(0, "Seed of prompt order, noise and the adapter's first weights.", least=-(2**63), below=2**64)

    # The run: checkpoints, evaluation, sample videos
    output_dir: str = setting("runs/run", "Folder of the run, relative to the working directory.")
    overwrite_output_dir: bool = setting(False, "Delete an earlier run in output_dir.")
    resume_from_checkpoint: str | None = setting(
        None,
        "latest, or the path of a checkpoints/step-N folder, to resume; without --config, with the "
        "settings of that run. auto: the latest checkpoint if there is one, else a new start; never over "
        "the results of a run. A process that torchrun restarts resumes as with auto.",
    )
    max_skipped_steps: int = setting(
        0, "Consecutive steps that may be skipped for a score that is not finite.", least=0
    )
    save_steps: int = setting(50, "Steps between checkpoints. 0: at the end only.", least=0)
    save_total_limit: int = setting(3, "Newest checkpoints that are kept. 0: all.", least=0)
    eval_steps: int = setting(0, "Optimizer steps between evaluations. 0: before and after only.", least=0)
    early_stopping_patience: int = setting(
        0, "Stop after so many evaluations without a new best gain. 0: never.", least=0
    )
    load_best_model_at_end: bool = setting(
        False, "Finish with the adapter that eval_reward_funcs rate best, of best_adapter/."
    )
    num_eval_prompts: int = setting(64, "Held-out prompts of an evaluation, from the first on.", least=1, most=10**6)
    eval_size: dict[str, int] | str | None = setting(
        None,
        "Size of evaluated and sample videos where it differs from the training's: {height: H, width: W, "
        "num_frames: F}, or some of them; as a flag, in quotes.",
        least=1,
        most=16384,
    )
    per_device_eval_batch_size: int = setting(8, "Videos sampled at a time, evaluating.", least=1, most=10000)
    eval_seed: int = setting(
        0, "Seed of the evaluation's noise, and of prompts that are drawn from a set.", least=-(2**63), below=2**64
    )
    num_diversity_prompts: int = setting(
        4, "Held-out prompts sampled a second time, to measure how far samples differ.", least=0
    )
    sample_steps: int = setting(0, "Steps between sample videos. 0: before and after.", least=0)
    num_sample_prompts: int = setting(
        10, "Held-out prompts shown as sample videos; six of them in the contact sheet.", least=0
    )
    report_to: list[str] = setting(
        ["tensorboard"], "Trackers of accelerate: tensorboard, wandb, trackio, swanlab...; or none."
    )

    def __post_init__(self):
        coerce_settings(self)
        self._complete_paths()

    def _complete_paths(self) -> None:
        """Expand ~, and make what is read absolute: config.yaml is read elsewhere, too."""
        for name in ("output_dir", "resume_from_checkpoint", "prompts", "eval_prompts", "base_dir"):
            if given := getattr(self, name):
                setattr(self, name, os.path.expanduser(given))
        self.base_dir = self.base_dir and os.path.abspath(self.base_dir)
        read = ("model", os.path.isdir), ("initial_adapter", os.path.exists), ("anchor_data", os.path.isdir)
        for name, is_there in read:
            given = os.path.expanduser(getattr(self, name) or "")
            places = [os.path.join(self.base_dir or "", given), given] if given not in ("", "nano") else []
            if found := next(filter(is_there, places), None):
                setattr(self, name, os.path.realpath(found))

    def to_yaml(self) -> str:
        """Return the settings as the YAML text that `--config` reads."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True, width=120)


def with_sampling(args: RewardGradientConfig, defaults: dict[str, Any]) -> RewardGradientConfig:
    """Return the settings with the model's own values, of `SAMPLING_KEYS`, where none was set."""
    unset = {key: defaults[key] for key in SAMPLING_KEYS if getattr(args, key) is None}
    return dataclasses.replace(args, **unset)


def at_eval_size(args: RewardGradientConfig) -> RewardGradientConfig:
    """Return the settings with the video size of the evaluation in place of the training's."""
    return dataclasses.replace(args, **args.eval_size or {})


def field_names() -> list[str]:
    """Return the names of all settings."""
    return [f.name for f in dataclasses.fields(RewardGradientConfig)]


def unknown_setting(word: str, where: str = "") -> str:
    """Return the problem of an unknown setting; suggest its successor or the nearest name."""
    name = word.split("=")[0].replace("-", "_")
    if moved := hint(name):
        return f"{where}{word}: no longer a setting; {moved}"
    near = difflib.get_close_matches(name, field_names(), n=1, cutoff=0.5)
    cure = f"did you mean {near[0]!r}?" if near else "`train_rlhf.py --help` lists the settings"
    return f"{where}{word}: no such setting; {cure}"


def is_distilled(settings: dict) -> bool:
    """Return whether the adapter of a run with these settings is sampled without guidance."""
    return settings.get("guidance_gradient") == "distill"
