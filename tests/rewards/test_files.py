"""Videos and pictures as people have them: what is read of each, and what is refused."""

import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, ImageSequence

from rewards.cli.files import numbered_pictures, read_video
from rlhf.run.video import write_video

FAULTS = Path(__file__).parents[1] / "data" / "faults"  # FFmpeg's command line, Pillow and OpenCV made them
SQUARES = np.kron(np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3)), np.ones((1, 16, 16, 1))).astype(np.uint8)
RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
GIF_TIMES = [0, *(0.75 + 0.12 * i for i in range(18))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five frames of squares at 5 a second as mp4, webm, mkv, avi and gif; the first as pictures."""
    folder = tmp_path_factory.mktemp("files")
    images = [Image.fromarray(frame) for frame in SQUARES]
    for ending in ("mp4", "mkv", "avi"):
        write_video(folder / f"clip.{ending}", torch.from_numpy(SQUARES).permute(3, 0, 1, 2), fps=5)
    for ending in ("gif", "webp", "apng"):
        more = {"save_all": True, "append_images": images[1:], "duration": 200}
        images[0].save(folder / f"clip.{ending}", **more, **({"quality": 95} if ending == "webp" else {}))
    images[0].save(folder / "picture.png")
    images[0].save(folder / "picture.JPG", "JPEG", quality=95, subsampling=0)
    images[0].convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    images[0].quantize(256).save(folder / "palette.png")
    images[0].save(folder / "second.jpg", "MPO", save_all=True, append_images=images[1:2], quality=95, subsampling=0)
    (folder / "broken.mp4").write_bytes(b"not a video")
    (folder / "broken.png").write_bytes(b"not an image")
    (folder / "empty.mp4").touch()
    (folder / "notes.txt").write_text("text")
    return folder


def corners(path) -> list[list[int]]:
    """Colours of the four quarters of the last frame."""
    video = read_video(path).pixels_BCTHW
    height, width = video.shape[-2:]
    places = [(y, x) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return [(video[0, :, -1, y, x] * 255).round().int().tolist() for y, x in places]


@pytest.mark.parametrize(
    ("name", "frames", "fps", "tolerance"),
    [
        *((f"clip.{ending}", 5, 5.0, 9) for ending in ("mp4", "mkv", "avi", "gif")),
        ("clip.webp", 5, 5.0, 9),
        ("clip.apng", 5, 5.0, 0),
        ("picture.png", 1, None, 0),
        ("picture.JPG", 1, None, 3),
        ("cmyk.jpg", 1, None, 3),
        ("palette.png", 1, None, 0),
        ("second.jpg", 1, None, 3),  # a phone's second picture is no frame
    ],
)
def test_what_is_read(folder, name, frames, fps, tolerance):
    video = read_video(folder / name)
    assert video.pixels_BCTHW.shape == (1, 3, frames, 64, 96)
    assert video.pixels_BCTHW.dtype == torch.float32
    assert video.info == ({} if fps is None else {"fps": fps})
    assert video.missing is None
    expected = torch.from_numpy(SQUARES[:frames]).permute(3, 0, 1, 2)[None]
    assert (video.pixels_BCTHW * 255 - expected).abs().mean() <= tolerance, "mean grey levels"
    leading = read_video(folder / name, 2)
    assert torch.equal(leading.pixels_BCTHW, video.pixels_BCTHW[:, :, :2])
    assert leading.info == video.info


@pytest.mark.parametrize(
    ("name", "fps", "times", "mean"),
    [
        ("mv.mp4", 8, None, 0.8725),
        ("mv_pil.gif", 19 / 2.91, GIF_TIMES, 0.869),
        ("mv_vfr.mp4", 19 / 3, [0, *(0.75 + i / 8 for i in range(18))], 0.8725),
        ("vfr.mp4", 9 / 4.625, [0, 0.125, 0.25, 0.375, 0.5, 0.625, 1.625, 2.625, 3.625], 0.295),
        ("anim.webp", 8, None, 0.3007),
        ("anim.png", 8, None, 0.3007),
        ("trimmed.mp4", 8, None, 0.4975),  # the edit list shows the last four of eight frames
        ("i16.png", None, None, 0.523),
    ],
)
def test_stored_frames_at_their_own_times(name, fps, times, mean):
    video = read_video(FAULTS / name)
    assert video.info.get("fps") == (fps and pytest.approx(fps))
    assert video.info.get("times") == (times and pytest.approx(times))
    counts = {"mv.mp4": 24, "trimmed.mp4": 4, "i16.png": 1}
    assert video.pixels_BCTHW.shape[2] == len(times or [None] * counts.get(name, 9))
    assert video.pixels_BCTHW.mean().item() == pytest.approx(mean, abs=0.002)
    if times:  # of the leading frames, too, "fps" is frames over seconds
        assert read_video(FAULTS / name, 6).info["fps"] == pytest.approx(6 / times[6])


def test_rounded_times_are_a_constant_rate(tmp_path):
    """Matroska rounds to milliseconds: 0, 42, 83, 125 and so on; GIF to hundredths of a second."""
    write_video(tmp_path / "a.mkv", torch.zeros(3, 17, 16, 16, dtype=torch.uint8), fps=24)
    assert read_video(tmp_path / "a.mkv").info == {"fps": 24.0}
    images = [Image.fromarray(frame) for frame in SQUARES]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=[130, 120, 130, 120, 130])
    assert read_video(tmp_path / "a.gif").info == {"fps": pytest.approx(8)}


def test_a_skipped_tick_is_no_rounding(tmp_path):
    """Times of a clock as slow as the frames: 0, 1, 2, 4 and 5 eighths of a second."""
    with av.open(str(tmp_path / "a.nut"), "w") as container:
        stream = container.add_stream("ffv1", rate=8, options={"level": "3"})
        stream.width, stream.height = 16, 16
        for tick in (0, 1, 2, 4, 5):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))
            frame.pts, frame.time_base = tick, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (tmp_path / "a.nut").rename(tmp_path / "a.mkv")
    assert read_video(tmp_path / "a.mkv").info["times"] == [0, 0.125, 0.25, 0.5, 0.625]


@pytest.mark.parametrize(
    ("name", "colours"),
    [
        ("hevc_10_bit.mp4", [WHITE, BLUE, GREEN, RED]),  # turned upside down
        ("full_range.mp4", [RED, GREEN, BLUE, WHITE]),
        ("bt709.webm", [RED, GREEN, BLUE, WHITE]),
        ("turned.mp4", [WHITE, GREEN, BLUE, RED]),  # a quarter turn, mirrored
        ("wide.mp4", [RED, GREEN, BLUE, WHITE]),
        ("cover.mp4", [RED, GREEN, BLUE, WHITE]),  # its first stream is a picture
        ("half_clear.webm", [[255, 128, 128]] * 4),
    ],
)
def test_colours_and_shape_follow_the_tags(name, colours):
    assert np.abs(np.array(corners(FAULTS / name)) - colours).max() <= 4
    assert read_video(FAULTS / name).pixels_BCTHW.shape[4] == {"wide.mp4": 128, "half_clear.webm": 32}.get(name, 64)


@pytest.mark.parametrize(("ending", "codec", "form"), [("mkv", "ffv1", "bgr0"), ("mp4", "png", "rgb24")])
@pytest.mark.parametrize(("marked", "grey"), [((), 51), ((1,), 102), ((1, 2), 102), ((2,), 153), ((0, 2), 51)])
def test_the_video_that_is_marked_as_default_is_read(marked, grey, ending, codec, form, tmp_path):
    """Three videos in a file, each of its own grey and length."""
    with av.open(str(tmp_path / f"a.{ending}"), "w") as container:
        streams = [container.add_stream(codec, rate=8) for _ in range(3)]
        for i, stream in enumerate(streams):
            stream.width, stream.height, stream.pix_fmt = 16, 16, form
            stream.disposition = av.stream.Disposition.default if i in marked else 0
        for i, stream in enumerate(streams):
            for _ in range(i + 2):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((16, 16, 3), 51 * i + 51, np.uint8))))
            container.mux(stream.encode())
    pixels = read_video(tmp_path / f"a.{ending}").pixels_BCTHW
    assert (pixels * 255).unique().tolist() == [grey]
    assert pixels.shape[2] == grey // 51 + 1


@pytest.mark.parametrize(("level", "grey"), [(64, 0), (502, 127.5), (940, 255)])
def test_ten_bits_lose_no_brightness(level, grey, tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=8, options={"level": "3"})
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p10le"
        frame = av.VideoFrame(32, 16, "yuv420p10le")
        for i, plane in enumerate(frame.planes):
            plane.update(np.full(plane.buffer_size // 2, 512 if i else level, "<u2").tobytes())
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert read_video(tmp_path / "a.mkv").pixels_BCTHW.mean().item() * 255 == pytest.approx(grey, abs=0.6)


def picture(mode, value, **more) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (8, 8), value).save(file, "PNG", **more)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "colour"),
    [
        (picture("RGBA", (255, 0, 0, 0)), WHITE),  # black or red, if transparency is dropped
        (picture("RGBA", (0, 0, 0, 128)), [127] * 3),
        (picture("LA", (0, 0)), WHITE),
        (picture("P", 0, transparency=0), WHITE),
        (picture("L", 51), [51] * 3),
        (picture("1", 1), WHITE),
        (picture("I;16", 257 * 51), [51] * 3),
    ],
)
def test_pictures_of_every_mode(content, colour, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    assert corners(tmp_path / "a.png") == [colour] * 4


DEEP = np.array(
    [[0, 65535, 258], [1000, 2000, 3000], [32768, 255, 256], [65280, 1, 12345], [1, 2, 3], [60000, 50000, 40000]]
)


def test_another_tools_picture_of_16_bits_keeps_them():
    pixels = read_video(FAULTS / "rgb16.png").pixels_BCTHW[0, :, 0].permute(1, 2, 0) * 65535
    np.testing.assert_allclose(pixels, DEEP.reshape(3, 2, 3), atol=0.01)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["rgb48be", "rgba64be", "gray16be", "ya16be"])
def test_pictures_of_16_bits_keep_them_upright_and_over_white(form, orientation, tmp_path):
    """FFmpeg writes the file. Pillow turns each channel as a picture of its own, by the same tag."""
    channels = {"r": 3, "g": 1, "y": 2}[form[0]] + (form == "rgba64be")
    pixels_HWC = np.random.default_rng(0).integers(0, 65536, (3, 5, channels)).astype(">u2")
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 5, 3, form, Fraction(1)
    frame = av.VideoFrame(5, 3, form)
    rows = np.zeros((3, frame.planes[0].line_size), np.uint8)
    rows[:, : 10 * channels] = pixels_HWC.reshape(3, -1).view(np.uint8)
    frame.planes[0].update(rows)
    content = b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode()])
    exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + bytes([0, orientation, 0, 0, 0, 0, 0, 0])
    (tmp_path / "a.png").write_bytes(content[:33] + chunk(b"eXIf", exif) + content[33:])  # after the header

    colour = pixels_HWC[..., :1] if channels < 3 else pixels_HWC[..., :3]
    alpha = pixels_HWC[..., -1:] / 65535 if channels in (2, 4) else 1
    expected = np.broadcast_to(1 - alpha * (1 - colour / 65535), (3, 5, 3)).astype(np.float32)
    turned = []
    for channel in np.moveaxis(expected, 2, 0):
        image = Image.fromarray(channel)
        image.getexif()[0x0112] = orientation
        turned.append(np.array(ImageOps.exif_transpose(image)))
    found = read_video(tmp_path / "a.png").pixels_BCTHW[0, :, 0]
    np.testing.assert_allclose(found, turned, atol=0.51 / 65535)


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG: length, name, content and checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def test_frames_of_an_animation_are_composed(tmp_path):
    """A transparent part shows the frame before; the stand-in of an animated PNG is no frame."""
    red, patch = Image.new("RGBA", (8, 8), "red"), Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    patch.paste((0, 0, 255, 255), (4, 4, 8, 8))
    stand_in = Image.new("RGBA", (8, 8), "lime")
    more = {"save_all": True, "append_images": [red, patch], "duration": [5, 300], "default_image": True}
    stand_in.save(tmp_path / "a.png", **more, blend=1)
    assert len(list(ImageSequence.Iterator(Image.open(tmp_path / "a.png")))) == 3
    video = read_video(tmp_path / "a.png")
    assert video.info == {"fps": 10}, "browsers show 5 ms as 100"
    assert corners(tmp_path / "a.png") == [RED, RED, RED, BLUE]


def test_a_turned_photograph_is_upright(folder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    Image.fromarray(SQUARES[0]).save(tmp_path / "turned.png", exif=exif)
    upright = torch.rot90(read_video(folder / "picture.png").pixels_BCTHW, -1, (3, 4))
    assert torch.equal(read_video(tmp_path / "turned.png").pixels_BCTHW, upright)


# ---------------------------------------- cut short, damaged, unknown


def cut(path: Path, target: Path, share: float = 0.8) -> Path:
    target = target / path.name
    target.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return target


@pytest.mark.parametrize(
    ("name", "got", "frames"),
    [
        ("big_cut.mp4", "got 18 of 32 frames, expected all; get the whole file, or score what is there with", 18),
        ("clip.mkv", r" bytes, with \d frames, expected all", None),
        ("clip.avi", r"got \d of 5 frames, expected all", None),
        ("half_clear.webm", "got 604 of 756 bytes, with 1 frames, expected all", 1),
    ],
)
def test_a_file_that_ends_before_its_header_says(folder, name, got, frames, tmp_path):
    path = FAULTS / name if (FAULTS / name).exists() else folder / name
    path = path if "cut" in name else cut(path, tmp_path)
    with pytest.raises(ValueError, match=got) as caught:
        read_video(path)
    assert str(caught.value).startswith(f"{path}: ")
    with pytest.raises(ValueError, match=got):
        read_video(path, max_frames=2)
    video = read_video(path, allow_truncated=True)
    assert video.pixels_BCTHW.shape[2] == frames or frames is None
    assert 0 < video.pixels_BCTHW.shape[2] < 5 or frames
    assert f"{video.missing}, expected all" in str(caught.value)


def test_a_damaged_frame_is_refused(folder, tmp_path):
    content = bytearray((FAULTS / "big_cut.mp4").read_bytes())
    content[12000:12040] = bytes(40)
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.mp4: got a damaged frame at [\d.]+ s, expected none"):
        read_video(tmp_path / "a.mp4", allow_truncated=True)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("absent.mp4", "got no file there"),
        ("notes.txt", "got '.txt', expected one of .mp4"),
        ("broken.mp4", "can't be decoded"),
        ("broken.png", "can't be decoded"),
        ("empty.mp4", "can't be decoded"),
        ("clip.gif", "got a GIF without its end"),
        ("clip.apng", "can't be decoded"),
        ("clip.webp", "can't be decoded"),
        ("picture.png", "can't be decoded"),
        ("mv.mp4", "can't be decoded (Invalid data found when processing input: moov atom not found)"),
        ("hlg.mp4", "got HDR, HLG, expected standard dynamic range"),
    ],
)
def test_files_that_can_not_be_read(folder, name, told, tmp_path, capfd):
    path = FAULTS / name if (FAULTS / name).exists() else folder / name
    path = cut(path, tmp_path, 0.5) if name[:4] in ("clip", "pict", "mv.m") else path
    with pytest.raises(ValueError, match=name) as caught:
        read_video(path)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == "", "FFmpeg prints nothing of its own"


@pytest.mark.parametrize("form", ["TIFF", "PPM", "JPEG2000"])
def test_another_format_under_a_pictures_name_is_refused(form, tmp_path):
    Image.fromarray(SQUARES[0]).save(tmp_path / "a.png", form)
    with pytest.raises(ValueError, match=f"a.png: got {form} inside, expected one of PNG, JPEG"):
        read_video(tmp_path / "a.png")


def test_a_gif_that_ends_between_two_frames_is_refused(folder, tmp_path):
    content = (folder / "clip.gif").read_bytes()
    control = b"\x21\xf9\x04"  # begins each frame
    (tmp_path / "a.gif").write_bytes(content[: content.rindex(control)])
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 4, "Pillow takes it for a shorter one"
    with pytest.raises(ValueError, match=r"a.gif: got a GIF without its end, expected all frames"):
        read_video(tmp_path / "a.gif")
    (tmp_path / "a.gif").write_bytes(content + bytes(4))
    assert read_video(tmp_path / "a.gif").pixels_BCTHW.shape[2] == 5


def test_a_fragmented_mp4_that_ends_inside_a_fragment_is_refused(tmp_path):
    """Each fragment has its own index: what is missing is not in the others."""
    fragments = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    with av.open(str(tmp_path / "a.mp4"), "w", options=fragments) as container:
        stream = container.add_stream("mpeg4", 5, options={"g": "1"})
        stream.height, stream.width = SQUARES.shape[1:3]
        for picture in SQUARES:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))
    content = (tmp_path / "a.mp4").read_bytes()
    assert read_video(tmp_path / "a.mp4").pixels_BCTHW.shape[2] == 5
    (tmp_path / "a.mp4").write_bytes(content + bytes(8))  # padding
    assert read_video(tmp_path / "a.mp4").pixels_BCTHW.shape[2] == 5
    for cut_at in range(content.rindex(b"moof") - 1, content.rindex(b"mdat") + 9, 8):
        (tmp_path / "a.mp4").write_bytes(content[:cut_at])
        with pytest.raises(ValueError, match=r"a\.mp4: got "):
            read_video(tmp_path / "a.mp4")


@pytest.mark.parametrize(("transfer", "told"), [(8, "linear light"), (16, "HDR, PQ")])
def test_pictures_and_videos_of_another_brightness_are_refused(transfer, told, folder, tmp_path):
    chunk = b"cICP" + bytes([9, transfer, 0, 1])  # PNG's name for the colours of H.273
    chunk = struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    content = (folder / "picture.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])  # after the header
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", 5)
        stream.height, stream.width, stream.codec_context.color_trc = *SQUARES.shape[1:3], transfer
        container.mux(stream.encode(av.VideoFrame.from_ndarray(SQUARES[0])))
        container.mux(stream.encode(None))
    for name in ("a.png", "a.mkv"):
        with pytest.raises(ValueError, match=f"{name}: got {told}, expected standard dynamic range"):
            read_video(tmp_path / name)


# ---------------------------------------- a folder of pictures


def test_a_folder_of_numbered_pictures_is_a_video(tmp_path):
    for i, frame in enumerate(SQUARES):
        Image.fromarray(frame).save(tmp_path / f"frame_{2 * i + 8}.png")  # 8 comes before 10
    (tmp_path / "._frame_9.png").write_bytes(b"of a Mac")
    (tmp_path / "notes.txt").touch()
    video = read_video(tmp_path, fps=12)
    assert torch.equal(video.pixels_BCTHW * 255, torch.from_numpy(SQUARES).permute(3, 0, 1, 2)[None].float())
    assert video.info == {"fps": 12}
    assert read_video(tmp_path, 3, fps=12).pixels_BCTHW.shape[2] == 3
    with pytest.raises(ValueError, match="expected a file, or numbered pictures and their frame rate; .* add --fps"):
        read_video(tmp_path)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([], "got a folder without pictures"),
        (["1.png", "2.png", "cover.png"], "cover.png: got no number in the name"),
        (["1.png", "2.png", "4.png"], "4.png: got it next to 2.png, expected evenly spaced numbers"),
        (["1.png", "2.png", "3.tif"], "3.tif: got a picture of another kind, expected only .png"),
        (["1.png", "01.jpg"], "expected evenly spaced numbers, each once"),
    ],
)
def test_folders_that_are_no_video(names, told, tmp_path):
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(ValueError, match=told):
        read_video(tmp_path, fps=8)


def test_pictures_of_another_size_are_refused(tmp_path):
    for i in (1, 2):
        Image.new("RGB", (8 * i, 8)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"2.png: got 16x8 pixels, expected 8x8 pixels, as 1.png has"):
        read_video(tmp_path, fps=8)


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["f0", "f-1", "f-2", "f1"], ["f-2", "f-1", "f0", "f1"]),  # times around an event
        (["f-10", "f-9", "f-8"], ["f-8", "f-9", "f-10"]),
        (["10", "9", "8"], ["8", "9", "10"]),
    ],
)
def test_a_hyphen_is_a_minus_only_where_other_names_have_none(tmp_path, names, ordered):
    for name in names:
        (tmp_path / f"{name}.png").touch()
    assert [path.stem for path in numbered_pictures(tmp_path)] == ordered


def test_an_animation_among_numbered_pictures_is_refused(tmp_path):
    still, other = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    still.save(tmp_path / "1.png")
    still.save(tmp_path / "2.png", save_all=True, append_images=[other])
    with pytest.raises(ValueError, match="2.png: got an animation, expected one frame"):
        read_video(tmp_path, fps=8)
