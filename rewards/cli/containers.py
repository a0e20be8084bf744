"""Read video containers with PyAV: all frames upright, in RGB, with their times.

A file that ends before its header says is found by its index or its stated size.

Shape legend: H height, W width.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, pairwise, takewhile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rewards.contract import leading_info

UNSCORED = {8: "linear light", 16: "HDR, PQ", 18: "HDR, HLG"}  # transfer functions, ITU-T H.273
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own drop the transparency
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # of Matroska and WebM


@dataclass(frozen=True)
class Frames:
    """Decoded frames with the times of all frames of their file.

    pixels      (H, W, 3) each, uint8 or uint16; leading ones, if not all are read
    starts      seconds at which each frame begins to be shown, ascending; none of a picture, [0] of
                frames that are evenly spaced by definition
    end         seconds at which the last one ends
    rates       frame rates that the file states
    resolution  seconds to which the file rounds times
    missing     what a file that was cut short lacks, in words
    """

    pixels: list[np.ndarray]
    starts: Sequence[float] = ()
    end: float = 0.0
    rates: tuple = ()
    resolution: float = 1e-6
    missing: str | None = None

    def info(self) -> dict:
        """Return "fps", and "times" unless all frames are 1 / fps apart; {} of a picture."""
        if not self.starts:
            return {}
        times = [start - self.starts[0] for start in self.starts]
        mean = (len(times) - 1) / times[-1] if len(times) > 1 else None
        for rate in (*self.rates, *([mean] if mean else [])):
            tolerance = min(1.01 * self.resolution, 0.25 / float(rate))
            if all(abs(time - i / rate) <= tolerance for i, time in enumerate(times)):
                return {"fps": float(rate)}
        info = {"fps": len(times) / (self.end - self.starts[0]), "times": times}
        return leading_info(info, len(self.pixels))


def blend_over_white(pixels_HW4: np.ndarray) -> np.ndarray:
    """Return RGBA pixels (H, W, 4), uint8 or uint16, over white: (H, W, 3) of the same type."""
    white = np.iinfo(pixels_HW4.dtype).max
    alpha_HW1 = pixels_HW4[..., 3:].astype(np.float32) / white
    over_HW3 = white - alpha_HW1 * (white - pixels_HW4[..., :3].astype(np.float32))
    return over_HW3.round().astype(pixels_HW4.dtype)


def check_transfer(path: Path, transfer: int) -> None:
    """Raise ValueError for a transfer function (H.273) of other brightness than rewards know."""
    if transfer in UNSCORED:
        expected = "standard dynamic range, which rewards were trained on"
        raise ValueError(f"{path}: got {UNSCORED[transfer]}, expected {expected}; convert it with a tone mapping")


def read_png16(path: Path) -> np.ndarray:
    """Return the pixels of a PNG of 16 bits, (H, W, 3) uint16, of which Pillow keeps 8 in colour.

    Grey becomes RGB. Transparent pixels are over white. Raises av.FFmpegError.
    """
    import av

    decoder = av.CodecContext.create("png", "r")
    (frame,) = [*decoder.decode(av.Packet(path.read_bytes())), *decoder.decode(None)]
    (plane,), channels = frame.planes, len(frame.format.components)
    pixels_HWC = np.frombuffer(plane, ">u2").reshape(frame.height, -1)[:, : frame.width * channels]
    pixels_HWC = pixels_HWC.reshape(frame.height, frame.width, channels).astype(np.uint16)
    if channels < 3:  # grey
        pixels_HWC = pixels_HWC[..., [0, 0, 0, *range(1, channels)]]
    return blend_over_white(pixels_HWC) if pixels_HWC.shape[2] == 4 else pixels_HWC


def read_container(path: Path, max_frames: int | None, allow_truncated: bool) -> Frames:
    """Read at most the leading max_frames of the default video stream.

    Raises ValueError for a file that is cut short (unless allowed), damaged, or of high dynamic
    range.
    """
    with _open(path) as (container, stream):
        promised, tick = _promised_frames(container, stream), stream.time_base
        has_times = container.format.name != "avi"  # it has a rate alone
        rates = tuple(filter(None, (stream.average_rate, stream.guessed_rate)))
        packets = [
            (packet.pts, packet.duration or 0, packet.is_discard, packet.is_corrupt)
            for packet in container.demux(stream)
            if packet.size
        ]
    whole = [(pts, duration, discard) for pts, duration, discard, corrupt in packets if not corrupt]
    missing = _describe_truncation(path, len(whole), max(promised, len(packets)))
    if missing and not allow_truncated:
        cure = "get the whole file, or score what is there with --allow_truncated"
        raise ValueError(f"{path}: got {missing}, expected all; {cure}")
    with _open(path) as (container, stream):
        decoded = list(islice(_decode(path, container, stream), max_frames))
    if not (decoded and rates):
        raise ValueError("no frame in it, or no frame rate")
    starts, pixels = map(list, zip(*decoded, strict=True))
    if not has_times or None in starts or any(after <= before for before, after in pairwise(starts)):
        return Frames(pixels, [float(i / rates[0]) for i in range(len(pixels))], 0.0, rates, missing=missing)
    shown = sorted((pts, duration) for pts, duration, discard in whole if pts is not None and not discard)
    starts += [pts for pts, _ in shown if pts > starts[-1]]
    usual = (starts[-1] - starts[0]) / max(len(starts) - 1, 1)
    end = starts[-1] + (shown[-1][1] or usual)
    return Frames(pixels, [float(pts * tick) for pts in starts], float(end * tick), rates, float(tick), missing)


@contextmanager
def _open(path: Path) -> Iterator[tuple]:
    """Yield the container and the video stream that it marks as default, or the first one.

    A cover picture is no video. Raises ValueError with FFmpeg's message.
    """
    import av

    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture(local=False), av.open(path) as container:
            kinds = av.stream.Disposition
            streams = [x for x in container.streams.video if x.codec_context and not x.disposition & kinds.attached_pic]
            if not streams:
                raise ValueError("no video in it that can be read")
            yield container, next((x for x in streams if x.disposition & kinds.default), streams[0])
    except av.FFmpegError as error:
        said = f": {error.log[2].strip()}" if error.log else ""
        raise ValueError(f"{error.strerror}{said}") from error
    finally:
        av.logging.set_level(level)


def _promised_frames(container, stream) -> int:
    """Return the number of frames in the index, or in the header of an AVI; 0 if unknown."""
    entries = stream.index_entries
    empty = sum(not entry.size for entry in entries)  # of an AVI: the last frame stays on
    return (max(stream.frames, len(entries)) if container.format.name == "avi" else len(entries)) - empty


def _describe_truncation(path: Path, frames: int, promised: int) -> str | None:
    """Return what a file lacks, as text for an error; None if it is whole.

    frames: the undamaged ones. promised: by index or header.
    """
    stated, there = _stated_bytes(path), path.stat().st_size
    if frames < promised:
        return f"{frames} of {promised} frames"
    return f"{there} of {stated} bytes, with {frames} frames" if there < stated else None


def _stated_bytes(path: Path) -> int:
    """Return the size that a Matroska, WebM or MP4 file states; 0 if it states none.

    That is the header's of the first two, and of MP4 the end of the last box.
    """
    with path.open("rb") as file:
        head = file.read(4096)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return _end_of_boxes(file)
    at = head.find(SEGMENT) + len(SEGMENT)
    if not head.startswith(EBML) or at < len(SEGMENT):
        return 0
    length = 9 - head[at].bit_length()
    unknown = (1 << 7 * length) - 1  # as a live stream says
    size = int.from_bytes(head[at : at + length], "big") & unknown
    return 0 if size == unknown else at + length + size


def _end_of_boxes(file: BinaryIO) -> int:
    """Return where the last top-level box of an MP4 should end."""
    end = 0
    while True:
        file.seek(end)
        head = file.read(16)
        if not head[4:8].isalnum():  # the end, bytes that are no box, or a box without its name
            return end + 8 if 0 < len(head) < 8 else end
        size = int.from_bytes(head[8:] if head[:4] == b"\0\0\0\1" else head[:4], "big")
        if size < 8:  # 0: until the end of the file
            return end
        end += size


def _decode(path: Path, container, stream) -> Iterator[tuple[int | None, np.ndarray]]:
    """Yield presentation time, in ticks, and pixels of each frame, in the order of display."""
    import av

    decoder = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in ALPHA_DECODERS:
        decoder = av.CodecContext.create(ALPHA_DECODERS[decoder.name], "r")
    whole = takewhile(lambda packet: not packet.is_corrupt, container.demux(stream))  # up to where it was cut off
    for packet in chain((packet for packet in whole if packet.size), [None]):
        for frame in decoder.decode(packet):
            if frame.is_corrupt:  # others, unmarked, build on it
                raise ValueError(f"{path}: got a damaged frame at {frame.time} s, expected none; get the file again")
            yield frame.pts, _rgb(path, frame, stream.sample_aspect_ratio)


def _rgb(path: Path, frame, aspect) -> np.ndarray:
    """Return a frame upright, with square pixels, (H, W, 3) uint8, by its own colour tags.

    FFmpeg's direct way from more than 8 bits, or from another size, makes white 253. Therefore
    there are up to three steps.
    """
    import av

    check_transfer(path, frame.color_trc)
    pixels, transparent = frame, any(component.is_alpha for component in frame.format.components)
    if max(component.bits for component in frame.format.components) > 8:
        shorter = re.sub(r"(9|1[0246])(le|be)$", "", frame.format.name)
        pixels = frame.reformat(format=shorter if shorter in av.video.format.names else None)
    pixels = pixels.reformat(format="rgba" if transparent else "rgb24")
    if aspect and aspect != 1:
        width, height = max(round(frame.width * aspect), frame.width), max(round(frame.height / aspect), frame.height)
        pixels = pixels.reformat(width, height, interpolation="BICUBIC")
    pixels_HWC = pixels.to_ndarray()
    return _apply_display_matrix(blend_over_white(pixels_HWC) if transparent else pixels_HWC, frame)


def _apply_display_matrix(pixels_HWC: np.ndarray, frame) -> np.ndarray:
    """Rotate and mirror a frame by its display matrix, as a player does."""
    from av.sidedata.sidedata import Type

    if (matrix := frame.side_data.get(Type.DISPLAYMATRIX)) is None:
        return pixels_HWC
    (a, b, _), (c, d, _), _ = np.frombuffer(matrix, "<i4").reshape(3, 3).tolist()  # right -> (a, b), down -> (c, d)
    if abs(b) > abs(a):
        pixels_HWC, a, d = pixels_HWC.transpose(1, 0, 2), c, b
    return pixels_HWC[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
