"""The contact sheet of a run: frames of held-out prompts, before and after."""

import textwrap
from pathlib import Path

import torch

CONTACT_SHEET = "contact_sheet.png"
FRAMES_SHOWN, ROWS_SHOWN = 5, 6
BASE_COLOR, TUNED_COLOR = "#8a8f98", "#1f6feb"


def draw_contact_sheet(prompts: list[str], before_NCTHW: torch.Tensor, after_NCTHW: torch.Tensor, path: Path) -> None:
    """Draw a row for each leading prompt: caption, frames of the base, frames of the tuned model.

    Videos are uint8 (N, 3, T, H, W), made from the same noise. A prompt without both is left out.
    """
    count = min(len(before_NCTHW), len(after_NCTHW), ROWS_SHOWN)
    frames, height, width = before_NCTHW.shape[2:]
    shown = torch.linspace(0, frames - 1, min(FRAMES_SHOWN, frames)).round().long()
    tall, gap, caption, margin = height / width, 0.35, 0.34, 0.25  # inches; a frame is one inch wide
    side = len(shown)
    size = (2 * side + gap + 2 * margin, margin + 0.35 + count * (tall + caption))
    figure = new_figure(*size)

    def place(x, y, w, h):  # inches from the top left
        return figure.add_axes((x / size[0], 1 - (y + h) / size[1], w / size[0], h / size[1]))

    def write(x, y, text, **style):  # a prompt may have $, which is no formula
        figure.text(x / size[0], 1 - y / size[1], text, va="center", parse_math=False, **style)

    after_x = margin + side + gap
    write(margin, margin, "before", weight="bold", fontsize=12, color=BASE_COLOR)
    write(after_x, margin, "after", weight="bold", fontsize=12, color=TUNED_COLOR)
    for row, prompt in enumerate(prompts[:count]):
        y = margin + 0.15 + row * (tall + caption)
        text = textwrap.shorten(prompt, int(size[0] * 12), placeholder=" ...")
        write(margin, y + caption / 2 + 0.02, text, fontsize=9)
        for x, video in ((margin, before_NCTHW[row]), (after_x, after_NCTHW[row])):
            axis = place(x, y + caption, side, tall)
            axis.imshow(_strip(video[:, shown]), interpolation="nearest", aspect="auto")
            axis.axis("off")
    figure.savefig(path, dpi=150)


def _strip(video_CTHW: torch.Tensor):
    """Return the frames side by side, a thin white line between them, as (H, T * W, 3)."""
    line = max(1, video_CTHW.shape[-1] // 64)
    padded = video_CTHW.clone()
    padded[:, 1:, :, :line] = 255
    return padded.permute(2, 1, 3, 0).flatten(1, 2).numpy()


def new_figure(width: float, height: float):
    """Return a matplotlib figure of this size in inches, made without pyplot.

    Loading pyplot's backend would stop a notebook from showing its plots.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))
