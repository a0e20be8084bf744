"""What a run leaves to look at: metrics.jsonl, sample videos, summary.json and the table.

With `rlhf.trackers` all that logs; everything else returns its metrics.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from rlhf.config import RewardGradientConfig
from rlhf.device import peak_memory, reset_peak_memory
from rlhf.figures import contact_sheet, plot_curves
from rlhf.reading import read_log
from rlhf.run_folder import METRICS
from rlhf.trackers import Clip
from rlhf.video_set import unbroken

COST = ("seconds", "memory_gib")  # what differs between the metrics of two equal runs


class Cost:
    """What a piece of work takes that begins now: seconds, and the peak of memory in GiB as `peak_memory` tells it."""

    def __init__(self, device: torch.device):
        self.device, self.began = device, time.perf_counter()
        reset_peak_memory(device)

    def so_far(self) -> dict[str, float]:
        """By the names in `COST`: seconds and GiB until now."""
        return dict(zip(COST, (time.perf_counter() - self.began, peak_memory(self.device) / 2**30), strict=True))


class RunLog:
    """Metrics of a run, from its main process: the file, accelerate's trackers and the progress bar of the steps."""

    def __init__(self, accelerator, args: RewardGradientConfig, first_step: int):
        self.accelerator, self.folder = accelerator, Path(args.output_dir)
        self.is_main = accelerator.is_main_process
        if self.is_main:
            keep_rows(self.folder, last_step=first_step)
        self.bar = tqdm(
            total=args.max_steps, initial=first_step, desc="train", unit="step", disable=not self.is_main, smoothing=0.1
        )

    def step(self, metrics: dict[str, float]) -> None:
        """Log one optimizer step; metrics["step"] counts from 1."""
        if self.is_main:
            with (self.folder / METRICS).open("a") as file:
                file.write(json.dumps(metrics) + "\n")
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and k != "step"}
        self.accelerator.log(numbers, step=metrics["step"])
        if "skipped" in metrics:
            self.say(f"Step {metrics['step']} was skipped: {metrics['why']}")
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


def keep_rows(folder: Path, last_step: int) -> None:
    """Drop the rows after last_step, a checkpoint's, which a resumed run writes anew, and a half-written last row."""
    if (path := folder / METRICS).exists():
        rows = [row for row in read_metrics(folder) if row["step"] <= last_step]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl, one an optimizer step; none without the file, nor a last one that was half written."""
    return read_log(Path(folder) / METRICS)


class EvaluationBar:
    """A progress bar over the videos of an evaluation, callable with the number made."""

    def __init__(self, name: str, total: int, shown: bool):
        self.bar = tqdm(total=total, desc=f"evaluate {name}", unit="video", disable=not shown)

    def __call__(self, count: int) -> None:
        self.bar.update(count)

    def __enter__(self) -> Callable[[int], None]:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()


def write_samples(folder: Path, step: int, prompts: list[str], videos_NCTHW: torch.Tensor, fps: int) -> list[Clip]:
    """Write uint8 videos as folder/step-NNNNNN/00.mp4 and so on, and their prompts beside them; return them."""
    target = folder / f"step-{step:06d}"
    target.mkdir(parents=True, exist_ok=True)
    pairs = enumerate(zip(prompts, videos_NCTHW, strict=False))
    clips = [Clip(target / f"{i:02d}.mp4", prompt, video, fps) for i, (prompt, video) in pairs]
    for clip in clips:
        write_video(clip.path, clip.video_CTHW, fps)
    lines = [f"{clip.path.stem}\t{unbroken(clip.prompt)}\n" for clip in clips]
    (target / "prompts.txt").write_text("".join(lines), encoding="utf-8")
    return clips


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """[0, 1] to 0 .. 255, rounded, on the CPU."""
    return (video.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().contiguous()


def write_video(path: Path, video_CTHW: torch.Tensor, fps: int) -> None:
    """Write a uint8 video as H.264 in mp4, which every browser plays."""
    from diffusers.utils import export_to_video

    frames = [Image.fromarray(frame) for frame in video_CTHW.permute(1, 2, 3, 0).numpy()]
    export_to_video(frames, str(path), fps=fps, quality=8)


def write_results(
    folder: Path, summary: dict, prompts: list[str], before_NCTHW: torch.Tensor, after_NCTHW: torch.Tensor
) -> None:
    """Write summary.json, curves.png and, of uint8 videos if there are some, contact_sheet.png; print the table."""
    sheet, shown = folder / "contact_sheet.png", len(before_NCTHW) and len(after_NCTHW)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_curves(read_metrics(folder), folder / "curves.png")
    if shown:
        contact_sheet(prompts, before_NCTHW, after_NCTHW, sheet)
    print(f"\n{len(prompts)} held-out prompts, the same noise before and after\n\n{table(summary)}\n")
    print(f"{summary['steps']} steps in {summary['seconds']:.0f} s. Before and after: {folder / 'report.html'}")


def table(summary: dict) -> str:
    """The summary as text: a row for each trained reward, held-out judge and measure."""
    rows = [("", "base", "tuned", "difference", "95 % interval")]
    for group in ("trained", "held_out"):
        rows += [_row(f"{name} ({group.replace('_', '-')})", row) for name, row in summary[group].items()]
    rows += [_row(name, summary[name]) for name in ("motion", "diversity") if summary[name]]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _row(name: str, row: dict) -> tuple[str, ...]:
    low, high = row["ci95"]
    return name, f"{row['base']:.4f}", f"{row['tuned']:.4f}", f"{row['diff']:+.4f}", f"[{low:+.4f}, {high:+.4f}]"
