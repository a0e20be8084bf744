"""A run's folder: its files, whether it is free, and preparing it."""

import json
import shutil
from pathlib import Path

from rlhf.config import RewardGradientConfig
from rlhf.config.older import translate_old_settings
from rlhf.io import read_object, write_whole
from rlhf.types import row_of

METRICS = "metrics.jsonl"
DROPPED = "metrics.dropped.jsonl"  # rows of steps that a resumed run took again
PROMPTS = "prompts.txt"  # beside videos: name, tab, prompt
BEST = "best_adapter"
# Snapshots of prompts that were passed as objects, by setting.
PROMPT_FILES = {"prompts": "train_prompts.jsonl", "eval_prompts": "held_out_prompts.jsonl"}
# Everything that a run writes into its folder; any of the first three marks a run.
RUN_FILES = (
    "config.yaml",
    METRICS,
    "checkpoints",
    DROPPED,
    "samples",
    "evaluation",
    "adapter",
    BEST,
    "initial_adapter",
    *PROMPT_FILES.values(),
    "calibration.json",
    "trackers",
    "summary.json",
    "curves.png",
    "contact_sheet.png",
    "environment.jsonl",
    "report.html",
)


def has_run(folder: Path) -> bool:
    """Return whether a run was started in the folder; an empty folder of checkpoints is none."""
    places = (folder / name for name in RUN_FILES[:3])
    return any(next(path.iterdir(), None) if path.is_dir() else path.exists() for path in places)


def read_settings(folder: Path) -> dict:
    """Return the settings in the folder's config.yaml in today's form; {} for no file.

    Raises DamagedFileError.
    """
    path = folder / "config.yaml"
    return translate_old_settings(read_object(path))[0] if path.is_file() else {}


def prompt_snapshot(args: RewardGradientConfig, setting: str) -> str:
    """Return the path of the run's own copy of prompts that were passed as objects."""
    return str(Path(args.output_dir).resolve() / PROMPT_FILES[setting])


def start_run_folder(args: RewardGradientConfig, train_prompts: list[str], eval_prompts: list[str]) -> None:
    """Write config.yaml, prompt snapshots and a line of environment.jsonl into the folder.

    With `overwrite_output_dir`, the files of an earlier run are removed first.
    """
    from rlhf.run.environment import record_start  # imports accelerate, which looking at a folder does not need

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if args.overwrite_output_dir:
        for path in (folder / name for name in RUN_FILES):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    with write_whole(folder / "config.yaml") as unfinished:
        unfinished.write_text(args.to_yaml(), encoding="utf-8")
    for setting, prompts in (("prompts", train_prompts), ("eval_prompts", eval_prompts)):
        if getattr(args, setting) == prompt_snapshot(args, setting):
            write_prompts(folder / PROMPT_FILES[setting], prompts)
    record_start(folder, args.device)


def write_prompts(path: Path, prompts: list[str]) -> None:
    """Write a .jsonl file for `rlhf.prompts`; leave one that begins with these prompts as it is."""
    text = "".join(json.dumps(row_of(prompt), ensure_ascii=False) + "\n" for prompt in prompts)
    if not (path.is_file() and path.read_bytes().startswith(text.encode())):
        with write_whole(path) as unfinished:
            unfinished.write_bytes(text.encode())
