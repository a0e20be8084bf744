"""Read videos and pictures as they are stored: every frame once, with its own time.

PyAV reads videos (`rewards.cli.containers`). Pillow reads pictures and animations.

Shape legend: B batch, C channels, T frames, H height, W width.
"""

import mimetypes
import re
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch

from rewards.cli.containers import Frames, blend_over_white, check_transfer, read_container, read_png16

STILLS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PICTURES = (*STILLS, ".apng", ".gif")  # read by Pillow, some of them animated
VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".apng", ".webp")
ORIENTATION = 0x0112  # of EXIF
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF")  # by content, whatever the name says
ANIMATED = ("GIF", "PNG", "WEBP")  # formats; the further pictures of a phone's JPEG are not frames


@dataclass(frozen=True)
class DecodedVideo:
    """The frames of a file, each once, however long it is shown.

    pixels_BCTHW  (1, 3, T, H, W) float32 RGB in [0, 1]; transparent pixels over white
    info          keywords for a reward: {"fps": rate} of evenly spaced frames; of others "fps" is
                  frames over seconds, and "times" has the seconds of each; {} of a picture
    missing       what a file that was cut short lacks, in words; None if it is whole
    """

    pixels_BCTHW: torch.Tensor
    info: dict
    missing: str | None = None


def read_video(
    path: str | Path, max_frames: int | None = None, fps: float | None = None, allow_truncated: bool = False
) -> DecodedVideo:
    """Read a video, an animation, a picture, or a folder of numbered pictures.

    Args:
        path: the file or the folder.
        max_frames: read at most so many leading frames.
        fps: frame rate of a folder of pictures; files state their own times.
        allow_truncated: read what is there of a video that ends before its header says.

    Raises ValueError for a missing, unknown, damaged or truncated file.
    """
    path = check_file(path, fps)
    try:
        if path.is_dir():
            frames = _read_folder(path, max_frames, fps)
        elif path.suffix.lower() in PICTURES:
            frames = _read_pictures(path, max_frames)
        else:
            frames = read_container(path, max_frames, allow_truncated)
        pixels_THWC = np.empty((len(frames.pixels), *frames.pixels[0].shape), np.float32)
        for frame, out_HWC in zip(frames.pixels, pixels_THWC, strict=True):
            np.divide(frame, np.iinfo(frame.dtype).max, out=out_HWC, dtype=np.float32)
    except Exception as error:  # each decoder has its own errors
        if str(path) in str(error) and isinstance(error, ValueError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: got a file that can't be decoded ({reason}); create it again") from error
    return DecodedVideo(torch.from_numpy(pixels_THWC).permute(3, 0, 1, 2)[None], frames.info(), frames.missing)


def check_file(path: str | Path, fps: float | None = None) -> Path:
    """Return the path of a file with a known ending, or, with fps, of a folder.

    Raises ValueError for anything else.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if fps is None:
            expected = "a file, or numbered pictures and their frame rate"
            raise ValueError(f"{path}: got a folder, expected {expected}; name the files, or add --fps")
        return path
    if not path.is_file():
        raise ValueError(f"{path}: got no file there, expected a video or an image; correct the path")
    if path.suffix.lower() not in PICTURES + VIDEOS:
        kinds = ", ".join(dict.fromkeys(VIDEOS + PICTURES))
        raise ValueError(f"{path}: got {path.suffix or 'no ending'!r}, expected one of {kinds}; convert the file")
    return path


def visible_files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Return a folder's files with these endings, sorted; names that begin with a dot are none."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in endings and path.name[0] != ".")


def numbered_pictures(folder: Path) -> list[Path]:
    """Return a folder's pictures by the number at the end of their names.

    A hyphen before the number is a minus where other names have none, else a part of the name.

    Raises ValueError for no picture, one of another kind or without a number, and numbers that are
    not evenly spaced.
    """
    pictures = visible_files(folder, STILLS)
    found = {path: re.search(r"(-?)(\d+)$", path.stem) for path in pictures}
    if not pictures:
        raise ValueError(f"{folder}: got a folder without pictures, expected a file, or numbered pictures")
    for path in sorted({*folder.iterdir()} - {*pictures}):
        if path.name[0] != "." and (mimetypes.guess_type(path)[0] or "").startswith("image/"):
            expected = f"only {', '.join(STILLS)} among numbered pictures"
            raise ValueError(f"{path}: got a picture of another kind, expected {expected}; convert it")
    if unnumbered := [path for path in pictures if found[path] is None]:
        expected = "only names that end in a number, as frame_012.png"
        raise ValueError(f"{unnumbered[0]}: got no number in the name, expected {expected}; move it away")
    signed = len({match[1] for match in found.values()}) == 2
    numbers = {path: int(match[0] if signed else match[2]) for path, match in found.items()}
    pictures.sort(key=numbers.get)
    steps = [numbers[after] - numbers[before] for before, after in pairwise(pictures)]
    for step, (before, after) in zip(steps, pairwise(pictures), strict=True):
        if step != min(steps) or step == 0:
            expected = "evenly spaced numbers, each once"
            raise ValueError(f"{after}: got it next to {before.name}, expected {expected}; complete the folder")
    return pictures


def _read_folder(folder: Path, max_frames: int | None, fps: float) -> Frames:
    """Read a folder's pictures in order of number, as evenly spaced frames at `fps`.

    Raises ValueError for names without evenly spaced numbers, pictures of unequal size and
    animations.
    """
    pictures, pixels = numbered_pictures(folder)[:max_frames], []
    for path in pictures:
        frame, *more = _read_pictures(path, 2).pixels
        if more:
            raise ValueError(f"{path}: got an animation, expected one frame; move it away, or extract its frames")
        pixels.append(frame)
        if frame.shape != pixels[0].shape:
            got, expected = (f"{image.shape[1]}x{image.shape[0]} pixels" for image in (frame, pixels[0]))
            raise ValueError(f"{path}: got {got}, expected {expected}, as {pictures[0].name} has; convert it")
    return Frames(pixels, [0.0], rates=(fps,))


def _read_pictures(path: Path, max_frames: int | None) -> Frames:
    """Read a picture, or all frames of an animation."""
    from PIL import Image

    pixels, shown = [], []
    with Image.open(path) as image:
        _check_content(path, image.format)
        animated = image.format in ANIMATED and getattr(image, "is_animated", False)
        first = int(getattr(image, "default_image", False))  # an animated PNG's stand-in is no frame
        for index in range(first, image.n_frames) if animated else range(1):
            image.seek(index)
            image.load()  # only then does WebP know the duration
            if max_frames is None or len(pixels) < max_frames:
                pixels.append(_rgb(image))
            milliseconds = image.info.get("duration", 0)
            shown.append(milliseconds / 1000 if milliseconds > 10 else 0.1)  # as in browsers
        if not animated and image.format == "PNG" and path.read_bytes()[24] == 16:  # the header's bits of a sample
            pixels = [_upright(read_png16(path), image.getexif().get(ORIENTATION))]
    if not animated:
        return Frames(pixels)
    *starts, end = accumulate(shown, initial=0.0)
    return Frames(pixels, starts, end, rates=(1 / shown[0],), resolution=0.01)  # a GIF's hundredths


def _check_content(path: Path, found: str | None) -> None:
    """Raise ValueError for a picture of another format than its kind, in HDR, or cut short."""
    if found not in FORMATS:
        raise ValueError(f"{path}: got {found} inside, expected one of {', '.join(FORMATS)}; convert the file")
    content = path.read_bytes() if found in ("GIF", "PNG") else b""
    if found == "GIF" and not content.rstrip(b"\0\r\n").endswith(b";"):  # Pillow shows the frames that are there
        raise ValueError(f"{path}: got a GIF without its end, expected all frames; get the whole file")
    at = content.find(b"cICP", 0, content.find(b"IDAT"))  # transfer function: the second byte
    if found == "PNG" and at > 0:
        check_transfer(path, content[at + 5])


def _rgb(image) -> np.ndarray:
    """Return an upright picture (H, W, 3), uint8, or uint16 for 16-bit grey of an animation."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode[:2] in ("I;", "I"):  # 16-bit grey, which convert("RGB") would clip at 255
        return np.repeat(np.array(image).astype(np.uint16)[..., None], 3, axis=2)
    if image.has_transparency_data:
        return blend_over_white(np.array(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _upright(pixels_HWC: np.ndarray, orientation: int | None) -> np.ndarray:
    """Turn and mirror by EXIF's orientation: above 4 rows and columns are exchanged."""
    if orientation in (5, 6, 7, 8):
        pixels_HWC = pixels_HWC.transpose(1, 0, 2)
    down, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return pixels_HWC[:: -1 if down else 1, :: -1 if right else 1]
