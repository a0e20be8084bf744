"""The folder of a run: what is in it, and whether it is free."""

import shutil
from pathlib import Path

from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.io import read_object
from rlhf.prompts import write_prompts

METRICS = "metrics.jsonl"
BEST = "best_adapter"
# Of prompts that were handed over instead of named, by setting.
PROMPT_FILES = {"prompts": "train_prompts.jsonl", "eval_prompts": "held_out_prompts.jsonl"}
# Everything that a run writes into its folder; the first three say that there is one.
RUN_FILES = (
    "config.yaml",
    METRICS,
    "checkpoints",
    "samples",
    "evaluation",
    "adapter",
    BEST,
    *PROMPT_FILES.values(),
    "calibration.json",
    "trackers",
    "summary.json",
    "curves.png",
    "contact_sheet.png",
    "environment.jsonl",
    "report.html",
)


def run_in(folder: Path) -> bool:
    """Whether a run was started in the folder."""
    return any((folder / name).exists() for name in RUN_FILES[:3])


def settings_in(folder: Path) -> dict:
    """The settings of the run in the folder, as its config.yaml has them; {} where there is none.

    Raises DamagedFileError.
    """
    path = folder / "config.yaml"
    return read_object(path) if path.is_file() else {}


def own_prompts(args: RewardGradientConfig, setting: str) -> str:
    """The file in the run's folder that has the prompts of that setting where they were handed over."""
    return str(Path(args.output_dir).resolve() / PROMPT_FILES[setting])


def start_run_folder(args: RewardGradientConfig, train_prompts: list[str], eval_prompts: list[str]) -> None:
    """Make the folder, free of the files of an earlier run if they are to be overwritten, and write config.yaml.

    Prompts are written where args name the folder's own files of them. environment.jsonl gets a line for the start.
    Raises ConfigError for a folder that cannot be made.
    """
    from rlhf.environment import record_start  # with accelerate, which a mere look at the folder can do without

    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # what a look at permissions does not tell
        got = f"got no folder there ({error.strerror}), expected one that can be made"
        raise ConfigError([f"output_dir={args.output_dir}: {got}; choose another"]) from error
    if args.overwrite_output_dir:
        for path in (folder / name for name in RUN_FILES):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (folder / "config.yaml").write_text(args.to_yaml(), encoding="utf-8")
    for setting, prompts in (("prompts", train_prompts), ("eval_prompts", eval_prompts)):
        if getattr(args, setting) == own_prompts(args, setting):
            write_prompts(folder / PROMPT_FILES[setting], prompts)
    record_start(folder, args.device)
