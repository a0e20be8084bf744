"""Videos and images from files.

Shape legend: B batch, C channels, T frames, H height, W width.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEOS = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".gif")


def read_video(path: str | Path, max_frames: int | None = None) -> tuple[torch.Tensor, float | None]:
    """(1, 3, T, H, W) float32 RGB in [0, 1], and the frame rate, None for an image. At most the leading max_frames.

    Raises ValueError for a file that is absent, of another kind, or can't be read.
    """
    path = check_file(path)
    try:
        frames, fps = _image(path) if path.suffix.lower() in IMAGES else _video(path)
        video_THWC = torch.stack(list(islice(frames, max_frames)))
    except Exception as error:  # decoders have a dozen ways to say that a file is broken
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: got a file that can't be decoded ({reason}); write it anew") from error
    return video_THWC.permute(3, 0, 1, 2)[None].float() / 255, fps


def check_file(path: str | Path) -> Path:
    """The path, if there is a file of a kind that `read_video` knows; else ValueError, without reading it."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: got no file there, expected a video or an image; correct the path")
    if path.suffix.lower() not in IMAGES + VIDEOS:
        kinds = ", ".join(VIDEOS + IMAGES)
        raise ValueError(f"{path}: got {path.suffix or 'no ending'!r}, expected one of {kinds}; convert the file")
    return path


def _image(path: Path) -> tuple[Iterator[torch.Tensor], None]:
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        return iter([_pixels(ImageOps.exif_transpose(image).convert("RGB"))]), None


def _video(path: Path) -> tuple[Iterator[torch.Tensor], float]:
    import imageio.v3 as iio

    if path.suffix.lower() == ".gif":
        from PIL import Image, ImageSequence

        image = Image.open(path)
        fps = 1000 / (image.info.get("duration") or 100)  # milliseconds a frame; browsers show 0 as 100
        return (_pixels(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)), fps
    fps = iio.immeta(path, plugin="FFMPEG")["fps"]
    return (_pixels(frame) for frame in iio.imiter(path, plugin="FFMPEG")), fps


def _pixels(frame) -> torch.Tensor:
    """(H, W, 3) uint8."""
    import numpy as np

    return torch.from_numpy(np.array(frame))
