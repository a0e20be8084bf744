"""The settings of a run: one dataclass, read from a YAML file with flat keys, any of them again as a flag.

Names follow TRL and transformers where these have a word for a thing. What can be wrong between settings is looked at
in `rlhf.checks`, before any weight is loaded.
"""

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

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
        "transformer of more than 2 GiB, else float32. VAE, latents, scores and trained numbers are always float32.",
    )
    device: str | None = _key(None, "Kind of device, such as cpu. Default: the accelerator of this machine.")
    cpu_threads: int | None = _key(
        None,
        "Threads of one process on a CPU. Default: OMP_NUM_THREADS if you set it, else the cores this process has.",
    )
    prompts: str = _key(
        "nano_train",
        "Training prompts: a file with one prompt a line (# starts a comment), relative to the config file, or the "
        "built-in set nano_train.",
    )
    eval_prompts: str | None = _key(
        "nano_held_out",
        "Held-out prompts, named like `prompts`; built-in set nano_held_out. 'none': no evaluation, no samples.",
    )
    num_train_prompts: int = _key(4096, "How many prompts a built-in training set draws. A file is used whole.")
    base_dir: str | None = _key(None, "Folder that relative paths refer to. Default: the config file's.")

    # Rewards
    reward_funcs: list[str] = _key(
        ["nano_preference"],
        "Rewards to train on: built-in names, package.module:Class or path/file.py:Class. A file is code and is run.",
    )
    reward_weights: list[float] | None = _key(None, "One weight for each of reward_funcs. Default: 1 each.")
    reward_kwargs: dict | str | None = _key(
        None, "Arguments of rewards by name, {name: {argument: value}}; as a flag, the same in JSON."
    )
    normalise_rewards: bool = _key(
        True, "Weigh (score - mean) / std of those rewards that state their typical mean and spread."
    )
    calibrate_rewards: int = _key(
        0,
        "Videos of the base model on which that mean and spread are measured instead, before the first step. 0: none.",
    )
    reward_caps: dict[str, float] | str | None = _key(None, "Raw scores above which nothing is learnt, {name: cap}.")
    reward_targets: dict[str, float] | str | None = _key(None, "Raw scores to aim at instead, {name: target}.")
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

    # The gradient
    num_grad_steps: int = _key(
        1, "K: the gradient runs through the last K of the N denoising steps (DRaFT-K, arXiv 2309.17400)."
    )
    gradient_checkpointing: bool = _key(
        False, "Recompute the transformer's blocks in the backward pass: less memory, a third more time there."
    )
    decode_chunk: int | None = _key(None, "Latent frames decoded at a time. Default: all at once. Same video.")
    decode_checkpoint: bool = _key(False, "Recompute each decoded chunk in the backward pass; needs decode_chunk.")

    # The adapter (peft)
    lora_rank: int = _key(16, "Rank r of the LoRA adapters (arXiv 2106.09685).")
    lora_alpha: int | None = _key(None, "LoRA alpha: the adapter counts alpha / r. Default: the rank.")
    lora_target_modules: list[str] | None = _key(
        None, "Ends of the names of the linear layers that are adapted. Default: the eight attention projections."
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
        None, "'latest', or the path of a checkpoints/step-N folder, to go on from."
    )
    save_steps: int = _key(50, "Optimizer steps between checkpoints. 0: at the end only.")
    save_total_limit: int = _key(3, "Checkpoints kept, the newest. 0: all.")
    eval_steps: int = _key(0, "Optimizer steps between evaluations on held-out prompts. 0: before and after only.")
    num_eval_prompts: int = _key(64, "Held-out prompts that are evaluated: the leading ones.")
    per_device_eval_batch_size: int = _key(8, "Videos sampled at a time in an evaluation.")
    eval_seed: int = _key(0, "Source of the evaluation's noise, the same for every model and run.")
    num_diversity_prompts: int = _key(4, "Held-out prompts sampled a second time, to see how far samples differ.")
    sample_steps: int = _key(0, "Optimizer steps between sample videos. 0: before and after only.")
    num_sample_prompts: int = _key(6, "Held-out prompts shown as sample videos and in the contact sheet.")
    report_to: list[str] = _key(
        ["tensorboard"], "Trackers, through accelerate: tensorboard, wandb, trackio, swanlab and others; or none."
    )
    dry_run: bool = _key(False, "Check and print the settings and what they need; load no weights.")

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        problems = []
        for f in dataclasses.fields(self):
            try:
                setattr(self, f.name, coerce(getattr(self, f.name), hints[f.name]))
            except (TypeError, ValueError):
                expected = f"expected {_type_name(hints[f.name])}"
                problems.append(f"{f.name}: got {getattr(self, f.name)!r}, {expected}; correct its value")
        if problems:
            raise ConfigError(problems)
        if self.report_to == ["none"]:
            self.report_to = []
        if self.model != "nano" and Path(self.model).is_dir():  # config.yaml is read elsewhere, too
            self.model = str(Path(self.model).resolve())

    def to_yaml(self) -> str:
        """The settings as the YAML text that `--config` reads."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True, width=120)


def coerce(value, annotation):
    """`value` as the annotated type, forgiving what YAML and the shell blur: 1e-5 as text, 'none', one item for a list.

    Raises TypeError or ValueError where no reading makes sense.
    """
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if type(None) in options and (value is None or value == "none"):
        return None
    kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is list:
        return [
            coerce(item, typing.get_args(kind)[0]) for item in (value if isinstance(value, list | tuple) else [value])
        ]
    if kind is dict or typing.get_origin(kind) is dict:
        return _coerce_dict(value, numbers=kind is not dict)
    if kind is bool or kind is str:
        return _exactly(value, kind)
    return _coerce_number(value, kind)


def _coerce_number(value, kind):
    if isinstance(value, bool) or not isinstance(value, int | float | str) or kind(value) != float(value):
        raise TypeError(value)
    return kind(value)


def _coerce_dict(value, numbers: bool) -> dict:
    value = json.loads(value) if isinstance(value, str) else value
    if numbers:
        return {name: _coerce_number(number, float) for name, number in _exactly(value, dict).items()}
    if not all(isinstance(kwargs, dict) for kwargs in _exactly(value, dict).values()):
        raise TypeError(value)
    return value


def _exactly(value, kind):
    if not isinstance(value, kind):
        raise TypeError(value)
    return value


def _type_name(annotation) -> str:
    name = str(annotation) if typing.get_args(annotation) else annotation.__name__
    name = name.replace("dict[str, float] | str", "a mapping {name: number}")
    return name.replace(" | None", " or none").replace("dict | str", "a mapping {name: {argument: value}}")


def parse_config(argv: list[str], default_config: str | Path | None = None) -> RewardGradientConfig:
    """Settings from `--config FILE` (default: default_config) and flags; a flag beats the file, the file the default.

    Raises ConfigError naming every misspelt key with its nearest neighbour.
    """
    argv = _split_equals(argv)
    if "--config" not in argv and default_config is not None:
        argv = ["--config", str(default_config), *argv]
    path = _config_path(argv)
    problems = _unknown_keys(path)
    try:
        args, unknown_flags = _parse(argv, without_config=bool(problems))
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    problems += [_unknown(flag, "flag --") for flag in unknown_flags]
    if problems:
        raise ConfigError(problems)
    if args.base_dir is None and path is not None:
        args.base_dir = str(path.parent.resolve())
    return args


def _parse(argv: list[str], without_config: bool) -> tuple[RewardGradientConfig, list[str]]:
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message):  # argparse would print the whole usage and exit
            raise ConfigError([message])

    if without_config:  # its unknown keys are told already; look at the flags alone
        at = argv.index("--config")
        argv = argv[:at] + argv[at + 2 :]
    parser = Parser(RewardGradientConfig, prog="train_rlhf.py", allow_abbrev=False)
    args, rest = parser.parse_args_and_config(argv, return_remaining_strings=True)
    return args, [text[2:] for text in rest if text.startswith("--")] or rest


def _split_equals(argv: list[str]) -> list[str]:
    """--config=FILE as two words, the only form that TrlParser knows."""
    return [word for text in argv for word in (text.split("=", 1) if text.startswith("--config=") else [text])]


def _config_path(argv: list[str]) -> Path | None:
    if "--config" not in argv:
        return None
    at = argv.index("--config")
    path = Path(argv[at + 1]) if at + 1 < len(argv) else None
    if path is None or not path.is_file():
        got = "no path" if path is None else f"{path}, which is not a file"
        raise ConfigError([f"--config: got {got}; expected a YAML file such as configs/nano.yaml; correct the path"])
    return path


def _unknown_keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError([f"{path} is not YAML: {reason}; correct that line"]) from None
    if not isinstance(keys, dict):
        raise ConfigError(
            [f"{path}: got {type(keys).__name__}, expected lines of the form 'key: value'; correct the file"]
        )
    known = field_names()
    return [_unknown(str(key), f"{path.name}: key ") for key in keys if key not in known and key != "env"]


def field_names() -> list[str]:
    return [f.name for f in dataclasses.fields(RewardGradientConfig)]


def _unknown(name: str, where: str) -> str:
    near = difflib.get_close_matches(name.split("=")[0].replace("-", "_"), field_names(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "`train_rlhf.py --help` lists the settings"
    return f"{where}{name}: no such setting; {hint}"
