"""Read videos and images from files.

Shape legend: B batch, C channels, T frames, H height, W width.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEOS = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".gif")


def read_video(path: str | Path, max_frames: int | None = None) -> tuple[torch.Tensor, float | None]:
    """Return (1, 3, T, H, W) float32 RGB in [0, 1] and the frame rate, which is None for an image.

    At most the leading max_frames are read. Raises ValueError for a missing, unknown or damaged
    file.
    """
    path = check_file(path)
    try:
        frames, fps = _image(path) if path.suffix.lower() in IMAGES else _video(path)
        video_THWC = torch.stack(list(islice(frames, max_frames)))
    except Exception as error:  # each decoder has its own errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: got a file that can't be decoded ({reason}); create it again") from error
    return video_THWC.permute(3, 0, 1, 2)[None].float() / 255, fps


def check_file(path: str | Path) -> Path:
    """Return the path. Raises ValueError unless it is a file with a known ending."""
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
    """Return the frames, (H, W, 3) uint8 each, of a video or GIF, and the frame rate."""
    import imageio.v3 as iio

    if path.suffix.lower() == ".gif":
        from PIL import Image, ImageSequence

        image = Image.open(path)
        fps = 1000 / (image.info.get("duration") or 100)  # milliseconds per frame; browsers treat 0 as 100
        return (_pixels(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)), fps
    fps = iio.immeta(path, plugin="FFMPEG")["fps"]
    return (_pixels(frame) for frame in iio.imiter(path, plugin="FFMPEG")), fps


def _pixels(frame) -> torch.Tensor:
    """Return (H, W, 3) uint8."""
    import numpy as np

    return torch.from_numpy(np.array(frame))
