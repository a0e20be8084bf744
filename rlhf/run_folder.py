"""The folder of a run: what is in it, and whether it is free."""

import shutil
from pathlib import Path

from rlhf.config import ConfigError, RewardGradientConfig

METRICS = "metrics.jsonl"
BEST = "best_adapter"
# Everything that a run writes into its folder; the first three say that there is one.
RUN_FILES = (
    "config.yaml",
    METRICS,
    "checkpoints",
    "samples",
    "evaluation",
    "adapter",
    BEST,
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


def start_run_folder(args: RewardGradientConfig) -> None:
    """Make the folder, free of the files of an earlier run if they are to be overwritten, and write config.yaml.

    environment.jsonl gets a line for the start. Raises ConfigError for a folder that cannot be made.
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
    record_start(folder, args.device)
