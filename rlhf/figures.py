"""The two pictures of a run: curves of the training, and a contact sheet of before and after."""

import textwrap
from pathlib import Path

import torch

FRAMES_SHOWN, ROWS_SHOWN = 5, 6
BASE_COLOR, TUNED_COLOR = "#8a8f98", "#1f6feb"


def plot_curves(rows: list[dict], path: Path) -> None:
    """Curves over the optimizer steps of every reward and of the gradient norm; no file for no numbers.

    rows: as of metrics.jsonl.
    """
    names = [key for key in max(rows, key=len, default={}) if key.startswith("rewards/") and not key.endswith("_std")]
    panels = [("reward", "trained reward (weighted)"), *((n, n.removeprefix("rewards/")) for n in names)]
    panels = (panels if len(names) > 1 else panels[1:]) + [("grad_norm", "gradient norm, before clipping")]
    panels = [(key, title) for key, title in panels if any(key in row for row in rows)]
    if not panels:
        return
    columns = min(len(panels), 2 if len(panels) == 4 else 3)
    lines = -(-len(panels) // columns)
    figure = new_figure(4.6 * columns, 3.0 * lines)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, (key, title) in zip(axes.flat, panels, strict=False):
        steps, values = zip(*[(row["step"], row[key]) for row in rows if key in row], strict=True)
        axis.plot(steps, values, color=TUNED_COLOR, alpha=0.3, linewidth=1)
        axis.plot(steps, running_mean(values), color=TUNED_COLOR, linewidth=2)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.locator_params(axis="x", integer=True)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def running_mean(values: list[float], span: int = 10) -> list[float]:
    """Running mean over the last `span` steps."""
    return [sum(values[max(0, i + 1 - span) : i + 1]) / min(i + 1, span) for i in range(len(values))]


def contact_sheet(prompts: list[str], before_NCTHW: torch.Tensor, after_NCTHW: torch.Tensor, path: Path) -> None:
    """A row for each leading prompt: its caption, the base's frames on the left, the tuned model's on the right.

    Videos are uint8 (N, 3, T, H, W), made from the same noise; a prompt without one of the two is left out.
    """
    count, (frames, height, width) = min(len(before_NCTHW), len(after_NCTHW), ROWS_SHOWN), before_NCTHW.shape[2:]
    shown = torch.linspace(0, frames - 1, min(FRAMES_SHOWN, frames)).round().long()
    tile = 1.0  # inches
    tall, gap, caption, margin = tile * height / width, 0.35, 0.34, 0.25
    side = tile * len(shown)
    size = (2 * side + gap + 2 * margin, margin + 0.35 + count * (tall + caption))
    figure = new_figure(*size)

    def place(x, y, w, h):  # inches from the top left
        return figure.add_axes((x / size[0], 1 - (y + h) / size[1], w / size[0], h / size[1]))

    def write(x, y, text, **style):
        figure.text(x / size[0], 1 - y / size[1], text, va="center", parse_math=False, **style)  # a prompt may have $

    after_x = margin + side + gap
    write(margin, margin, "before", weight="bold", fontsize=12, color=BASE_COLOR)
    write(after_x, margin, "after", weight="bold", fontsize=12, color=TUNED_COLOR)
    for row, prompt in enumerate(prompts[:count]):
        y = margin + 0.15 + row * (tall + caption)
        write(
            margin, y + caption / 2 + 0.02, textwrap.shorten(prompt, int(size[0] * 12), placeholder=" ..."), fontsize=9
        )
        for x, video in ((margin, before_NCTHW[row]), (after_x, after_NCTHW[row])):
            axis = place(x, y + caption, side, tall)
            axis.imshow(_strip(video[:, shown]), interpolation="nearest", aspect="auto")
            axis.axis("off")
    figure.savefig(path, dpi=150)


def _strip(video_CTHW: torch.Tensor):
    """Frames side by side, with a thin white line between them, as (H, T * W, 3)."""
    line = max(1, video_CTHW.shape[-1] // 64)
    padded = video_CTHW.clone()
    padded[:, 1:, :, :line] = 255
    return padded.permute(2, 1, 3, 0).flatten(1, 2).numpy()


def new_figure(width: float, height: float):
    """A matplotlib figure of so many inches for a file, without a display.

    Nor with pyplot, whose backend belongs to the program around: a notebook would show no plots of its own any more.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))
