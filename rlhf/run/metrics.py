"""The metrics log of a run, its cost, and the progress bar of everything that takes long.

Only this module and `rlhf.run.trackers` log; all others return their metrics.
"""

import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from rlhf.config import RewardGradientConfig
from rlhf.device import peak_memory, reset_peak_memory
from rlhf.io import read_log, write_rows
from rlhf.run.folder import DROPPED, METRICS

COST = ("seconds", "memory_gib")  # metrics in which two equal runs differ


class Cost:
    """The time and peak memory of a piece of work that begins with this object."""

    def __init__(self, device: torch.device):
        self.device, self.began = device, time.perf_counter()
        reset_peak_memory(device)

    def elapsed(self) -> dict[str, float]:
        """Return seconds and peak GiB until now, by their names in `COST`."""
        values = time.perf_counter() - self.began, peak_memory(self.device) / 2**30
        return dict(zip(COST, values, strict=True))


def progress_bar(name: str, unit: str, total: int, shown: bool, initial: int = 0) -> tqdm:
    """Return a progress bar; with `shown` false it prints nothing."""
    options = {"unit": unit, "total": total, "initial": initial, "disable": not shown}
    return tqdm(desc=name, smoothing=0.1, **options)


class RunLog:
    """The metrics of a run: its file, accelerate's trackers and the progress bar of the steps.

    Only the main process writes the file and shows the bar.
    """

    def __init__(self, accelerator, args: RewardGradientConfig, first_step: int):
        self.accelerator, self.folder = accelerator, Path(args.output_dir)
        self.is_main = accelerator.is_main_process
        if self.is_main:
            drop_rows_after(self.folder, first_step)
        self.bar = progress_bar("train", "step", args.max_steps, self.is_main, first_step)

    def step(self, metrics: dict[str, float]) -> None:
        """Log one optimizer step; metrics["step"] counts from 1."""
        if self.is_main:
            with (self.folder / METRICS).open("a") as file:
                file.write(json.dumps(metrics) + "\n")
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        step = numbers.pop("step")
        self.accelerator.log(numbers, step=step)
        if "skipped" in metrics:
            self.say(f"Step {step} was skipped: {metrics['why']}")
        if "reward" in metrics:
            self.bar.set_postfix_str(f"reward {metrics['reward']:.4f}", refresh=False)
        self.bar.update()

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.is_main:
            self.bar.write(text)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()


def drop_rows_after(folder: Path, last_step: int) -> None:
    """Move the metrics after the step that a run resumes at to another file; drop a cut row."""
    if (path := folder / METRICS).exists():
        rows = read_metrics(folder)
        if dropped := [row for row in rows if row["step"] > last_step]:
            with (folder / DROPPED).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in dropped)
        write_rows(path, [row for row in rows if row["step"] <= last_step])


def seconds_before(saved: dict, folder: Path) -> float:
    """Return the seconds that a run had taken at a checkpoint; saved: `read_state` of it."""
    if "seconds" in saved or not saved["step"]:
        return saved.get("seconds", 0.0)
    # Earlier versions saved none.
    return math.fsum(row.get("seconds", 0.0) for row in read_metrics(folder) if row["step"] <= saved["step"])


def read_metrics(folder: Path) -> list[dict]:
    """Return the rows of metrics.jsonl, one an optimizer step; [] without the file."""
    return [row for row in read_log(Path(folder) / METRICS) if isinstance(row.get("step"), int)]
