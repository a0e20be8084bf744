"""The settings of a run: one dataclass, read from a YAML file with flat keys, any of them again as a flag.

Names follow TRL and transformers where these have a word for a thing. What can be wrong between settings is looked at
in `rlhf.checks`, before any weight is loaded.
"""

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from rlhf.coerce import coerced

SAMPLING_KEYS = (
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
    "negative_prompt",
    "max_sequence_length",
)


class ConfigError(ValueError):
    """Everything that is wrong with the settings, found at once."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        noun = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"The settings have {noun}:\n{lines}")


def _key(default, help: str):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class RewardGradientConfig:
    """Settings of `RewardGradientTrainer`. The help of each field gives its unit and, where it has one, its source."""

    # What is trained, on what
    model: str = _key("nano", "The generator: 'nano' (embedded), a local folder in diffusers layout, or a hub id.")
    dtype: str = _key(
        "auto",
        "Number format of the frozen transformer and text encoders: auto, float32 or bfloat16; auto is bfloat16 for a "
        "transformer of more than 2 GiB, else float32. The VAE has vae_dtype; latents, scores and trained numbers are "
        "always float32.",
    )
    device: str | None = _key(None, "Kind of device, such as cpu. Default: the accelerator of this machine.")
    cpu_threads: int | None = _key(
        None,
        "Threads of one process on a CPU. Default: OMP_NUM_THREADS if you set it, else the cores this process has.",
    )
    prompts: str = _key(
        "nano_train",
        "Training prompts: a file with one prompt a line (# starts a comment), or a .jsonl file of rows with a prompt, "
        "relative to the config file; or the built-in set nano_train.",
    )
    eval_prompts: str | None = _key(
        "nano_held_out",
        "Held-out prompts, named like `prompts`; built-in set nano_held_out. 'none': no evaluation, no samples.",
    )
    num_train_prompts: int = _key(4096, "How many prompts a built-in training set draws. A file is used whole.")
    base_dir: str | None = _key(
        None, "Folder where relative paths of prompts and rewards are looked for first. Default: the config file's."
    )

    # Rewards
    reward_funcs: list[str] = _key(
        ["nano_preference"],
        "Rewards to train on: built-in names, package.module:Class or path/file.py:Class. A file is code and is run.",
    )
    reward_weights: list[float] | None = _key(None, "One weight for each of reward_funcs. Default: 1 each.")
    reward_kwargs: dict[str, dict] | str | None = _key(
        None, "Arguments of rewards by name, {name: {argument: value}}; as a flag, the same in quotes."
    )
    normalise_rewards: bool = _key(
        True, "Weigh (score - mean) / std of each reward whose typical mean and spread are stated or measured."
    )
    calibrate_rewards: int = _key(
        0,
        "Videos of the base on which each reward's mean and spread are measured, instead of those it states. 0: none.",
    )
    reward_caps: dict[str, float] | str | None = _key(None, "Raw scores above which nothing is learnt, {name: cap}.")
    reward_targets: dict[str, float] | str | None = _key(None, "Raw scores to aim at from both sides, {name: target}.")
    balance_reward_gradients: bool = _key(False, "Scale each reward's pixel gradient to length 1 before weighing it.")
    eval_reward_funcs: list[str] = _key([], "Judges that only evaluate: never trained on, no gradient needed.")

    # Sampling; each defaults to the model's own
    height: int | None = _key(None, "Video height in pixels. Default: the model's.")
    width: int | None = _key(None, "Video width in pixels. Default: the model's.")
    num_frames: int | None = _key(None, "Frames of a video, 4k+1 for the Wan VAE. Default: the model's.")
    num_inference_steps: int | None = _key(None, "Denoising steps N. Default: the model's.")
    guidance_scale: float | None = _key(
        None, "Classifier-free guidance g in v_neg + g (v_text - v_neg); 1 or less is off. Default: the model's."
    )
    negative_prompt: str | None = _key(None, "What guidance leads away from. Default: the model's.")
    max_sequence_length: int | None = _key(None, "Tokens of the T5 text encoder. Default: the model's.")

    # The gradient. docs/methods.md compares the methods
    method: str = _key(
        "draft_k",
        "How the reward's gradient enters the denoiser: draft_k, draft_lv, alignprop, uniform, listed, drtune, refl or "
        "srpo.",
    )
    num_grad_steps: int = _key(
        1,
        "K: draft_k (arXiv 2309.17400) takes the gradient through the last K of the N denoising steps, alignprop "
        "through the last k, drawn from 1 to K, uniform and drtune through K evenly spaced ones. Others: 1.",
    )
    grad_steps: list[int] | None = _key(None, "For listed: the denoising steps with gradient, of 0 to N-1.")
    jump_steps: int | None = _key(
        None,
        "For refl and drtune: how many of the last steps the rollout may jump to x0 from, one drawn for each optimizer "
        "step. Default: a quarter of the steps for refl, 1 (no jump) for drtune.",
    )
    num_draws: int = _key(
        2, "Extra draws of the last step for draft_lv, gradients per rollout for srpo (every second one a penalty)."
    )
    align_sigmas: list[float] = _key(
        [0.75, 0.96], "For srpo: lowest and highest noise level at which videos are recovered; those of its code."
    )
    align_delta: float = _key(0.02, "For srpo: length, in sigma, of the one step that a recovered video takes.")
    relative_words: list[str] | None = _key(
        None,
        "Two phrases, positive and negative, put before each prompt: what is trained on is then the reward for the "
        "first less that for the second (arXiv 2509.06942, eq. 8 and 9).",
    )
    relative_strength: float = _key(0.2, "k in (1 + k) R(positive) - R(negative), with relative_words.")
    guidance_gradient: str = _key(
        "full",
        "What of guidance carries the gradient: full (exact), text (its text branch), none (only the unguided "
        "velocity), or distill: no guidance at all, the adapter is taught it by drift_weight.",
    )
    drift_weight: float = _key(
        0.0, "Weight of the drift from the base, which is in nats per element of the latents (docs/methods.md)."
    )
    drift_weighting: str = _key("kl", "How steps count in the drift: kl, as in a KL divergence, or even, all alike.")
    anchor_steps: int = _key(
        0, "Every n-th optimizer step takes no reward, but pulls back to the base on the base's own samples. 0: none."
    )

    # Speed and memory; the gradient stays the same. docs/performance.md has what each costs
    gradient_checkpointing: bool = _key(False, "Recompute the transformer's blocks in the backward pass.")
    keep_attention: bool = _key(False, "With gradient_checkpointing: keep the attention's result, recompute the rest.")
    stepwise_backward: bool = _key(
        False, "Back-propagate one denoising step and guidance branch at a time: memory of one, one forward more each."
    )
    guidance_together: bool = _key(False, "Run both branches of guidance as one batch: faster where a video is small.")
    attention_kernel: str = _key(
        "auto", "auto: on a CUDA device the fastest, by trying; default: PyTorch's choice; cudnn, flash or efficient."
    )
    compile_blocks: bool = _key(False, "Compile the parts of a block with torch.compile, once for all blocks.")
    offload_activations: bool = _key(False, "With gradient_checkpointing: what blocks keep waits in host memory.")
    stream_weights: bool = _key(
        False, "With gradient_checkpointing: frozen blocks live in host memory and come to the device one by one."
    )
    decode_chunk: int | None = _key(None, "Latent frames decoded at a time. Default: all at once. Same video.")
    decode_checkpoint: bool = _key(False, "Recompute each decoded chunk in the backward pass; needs decode_chunk.")
    decode_caches: str = _key(
        "keep", "With decode_checkpoint, where chunks keep what later ones need: keep (on the device) or host."
    )

    # Several devices; data parallel over the rest of the processes. docs/scaling.md says which layout when
    guidance_parallel: int = _key(1, "2: the two branches of guidance run on two processes.")
    sequence_parallel: int = _key(1, "Processes over which a video's tokens are divided (arXiv 2309.14509).")
    shard_base: bool = _key(False, "Divide the frozen transformer over all processes (FSDP2), for smaller devices.")
    ddp_timeout: int = _key(
        1800, "Seconds that a process waits for the others before the run ends with an error. Longer than any step."
    )

    # Cheaper, but not exact: off by default. docs/performance.md has what each costs and does
    base_bits: int | None = _key(None, "4: round the frozen base to 4 bits, by bitsandbytes. Default: no rounding.")
    vae_dtype: str = _key("float32", "Number format of the VAE: float32 or bfloat16.")
    decode_window: int | None = _key(
        None, "Score only so many frames in a row, from a drawn one on; no gradient into the latents before them."
    )
    prefix_steps: int | None = _key(None, "At most so many steps before the first one with gradient, while training.")
    guidance_every: int = _key(1, "Of steps without gradient, compute the negative branch at every n-th only.")
    sampling_weights: str = _key(
        "own", "Weights of no-grad steps: own (the trained model), or float8 (a copy in float8, adapter merged)."
    )
    rollout_uses: int = _key(1, "Optimizer steps in a row that start their window from the same rollout.")

    # The adapter (peft)
    lora_rank: int = _key(16, "Rank r of the LoRA adapters (arXiv 2106.09685).")
    lora_alpha: int | None = _key(None, "LoRA alpha: the adapter counts alpha / r. Default: the rank.")
    lora_target_modules: list[str] | None = _key(
        None, "Ends of the names of the linear layers that are adapted. Default: the eight attention projections."
    )
    lora_use_dora: bool = _key(False, "Train the weights' magnitudes, too (DoRA, arXiv 2402.09353).")
    lora_rank_pattern: dict[str, int] | str | None = _key(
        None, "Ranks of layers by name or regular expression where they differ from lora_rank; as a flag, in quotes."
    )
    lora_alpha_pattern: dict[str, int] | str | None = _key(None, "Alphas of layers, in the same way.")
    ema_decay: float = _key(
        0.0, "Decay of a running average of the trained numbers, which is evaluated and kept in their place. 0: none."
    )

    # The optimizer
    learning_rate: float = _key(1e-4, "Peak learning rate of AdamW.")
    lr_scheduler_type: str = _key("constant", "After the warm-up: constant, or linear down to 0 at max_steps.")
    warmup_steps: int = _key(0, "Optimizer steps over which the learning rate rises linearly from 0.")
    weight_decay: float = _key(0.0, "Decoupled weight decay of AdamW, towards an adapter of 0.")
    adam_beta1: float = _key(0.9, "AdamW's beta 1.")
    adam_beta2: float = _key(0.999, "AdamW's beta 2.")
    adam_epsilon: float = _key(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = _key(1.0, "The gradient is scaled down to this norm if it is longer. 0: never.")
    per_device_train_batch_size: int = _key(1, "Videos a process samples at a time.")
    gradient_accumulation_steps: int = _key(1, "Such batches per optimizer step.")
    max_steps: int = _key(100, "Optimizer steps of the whole run, resumed parts included.")
    seed: int = _key(0, "Source of everything random: prompt order, noise, the adapter's first values.")

    # Watching and keeping
    output_dir: str = _key("runs/run", "Where the run writes, relative to the working directory.")
    overwrite_output_dir: bool = _key(False, "Delete the files of an earlier run found in output_dir.")
    resume_from_checkpoint: str | None = _key(
        None,
        "'latest', or the path of a checkpoints/step-N folder, to go on from; without --config, by that run's own "
        "settings. 'auto': the latest if there is one, else start, over what is there. A process that torchrun starts "
        "again goes on as with 'auto'.",
    )
    max_skipped_steps: int = _key(
        0,
        "Optimizer steps in a row that may be skipped for a score or gradient that is not finite. 0: none.",
    )
    save_steps: int = _key(50, "Optimizer steps between checkpoints. 0: at the end only.")
    save_total_limit: int = _key(3, "Checkpoints kept, the newest. 0: all.")
    eval_steps: int = _key(0, "Optimizer steps between evaluations on held-out prompts. 0: before and after only.")
    early_stopping_patience: int = _key(
        0, "Stop after so many evaluations in a row that did not raise the eval_reward_funcs. 0: never."
    )
    early_stopping_threshold: float = _key(
        0.0, "What counts as raised: more than this above the best so far, in spreads of the base's scores."
    )
    load_best_model_at_end: bool = _key(
        False, "Finish with the adapter that eval_reward_funcs liked best, as kept in best_adapter/."
    )
    num_eval_prompts: int = _key(64, "Held-out prompts that are evaluated: the leading ones.")
    per_device_eval_batch_size: int = _key(8, "Videos sampled at a time in an evaluation.")
    eval_seed: int = _key(0, "Source of the evaluation's noise, the same for every model and run.")
    num_diversity_prompts: int = _key(4, "Held-out prompts sampled a second time, to see how far samples differ.")
    sample_steps: int = _key(0, "Optimizer steps between sample videos. 0: before and after only.")
    num_sample_prompts: int = _key(10, "Held-out prompts shown as sample videos; six of them in the contact sheet.")
    report_to: list[str] = _key(
        ["tensorboard"], "Trackers, through accelerate: tensorboard, wandb, trackio, swanlab and others; or none."
    )
    memory_limit_gib: float | None = _key(
        None, "Memory in GiB that the dry run plans for. Default: what this machine's device has."
    )
    plan_device: str | None = _key(
        None, "Device whose rates the dry run takes, such as 'NVIDIA H200'. Default: this machine's."
    )
    plan_processes: int | None = _key(
        None, "Processes that the dry run plans for, one a device. Default: those that were started."
    )
    dry_run: bool = _key(False, "Check and print the settings and what they need; load no weights.")

    def __post_init__(self):
        values, problems = coerced(dict(vars(self)), typing.get_type_hints(type(self)))
        if problems:
            raise ConfigError(problems)
        for name, value in values.items():
            setattr(self, name, value)
        if self.report_to == ["none"]:
            self.report_to = []
        if self.model != "nano" and Path(self.model).is_dir():  # config.yaml is read elsewhere, too
            self.model = str(Path(self.model).resolve())

    def to_yaml(self) -> str:
        """The settings as the YAML text that `--config` reads."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True, width=120)


def field_names() -> list[str]:
    """The names of all settings."""
    return [f.name for f in dataclasses.fields(RewardGradientConfig)]
