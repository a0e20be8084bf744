"""Folders of real videos with captions, as users have them."""

from pathlib import Path

import torch

from rlhf.io import write_rows
from rlhf.run.video import to_uint8, write_video

CAPTIONS = ["a grey cloud", "two waves", "the sea", "a red fox", "rain"]


def write_videos(folder: Path, count=4, width=32, height=16, frames=5, fps=8, seed=0) -> Path:
    """Write smooth random videos and videos.jsonl; return the folder."""
    folder.mkdir(parents=True)
    coarse = torch.rand(count, 3, 2, 2, 3, generator=torch.Generator().manual_seed(seed))
    videos = torch.nn.functional.interpolate(coarse, (frames, height, width), mode="trilinear")
    for i, video in enumerate(videos):
        write_video(folder / f"{i}.mp4", to_uint8(video), fps)
    write_rows(folder / "videos.jsonl", [{"file": f"{i}.mp4", "prompt": CAPTIONS[i % 5]} for i in range(count)])
    return folder
