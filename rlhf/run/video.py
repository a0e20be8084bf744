"""Video files of a run: eight bits, H.264, samples with their prompts."""

from pathlib import Path

import torch

from rlhf.io import single_line
from rlhf.run.folder import PROMPTS
from rlhf.run.trackers import Clip

SMPTE170M = 6  # BT.601, ITU-T H.273


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """Return a video in [0, 1] as rounded 0 .. 255, on the CPU."""
    return (video.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().contiguous()


def finished_video(video: torch.Tensor) -> torch.Tensor:
    """Return a sampled video by `to_uint8`. Raises ValueError for pixels that are no numbers."""
    if not video.isfinite().all():
        cure = "use a smaller scale of the adapter, another adapter, or weights that are not damaged"
        raise ValueError(f"got a video with NaN or infinite pixels, expected numbers: the model overflows; {cure}")
    return to_uint8(video)


def write_video(path: Path, video_CTHW: torch.Tensor, fps: int) -> None:
    """Write a uint8 video (3, T, H, W) as H.264, which every browser plays.

    Height and width must be even.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10"})  # hardly a visible loss
        stream.height, stream.width = video_CTHW.shape[2:]
        stream.codec_context.colorspace = SMPTE170M  # the matrix that FFmpeg takes from RGB
        for frame in video_CTHW.permute(1, 2, 3, 0).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def write_samples(folder: Path, step: int, prompts: list[str], videos_NCTHW: torch.Tensor, fps: int) -> list[Clip]:
    """Write uint8 videos to folder/step-NNNNNN/00.mp4 and so on, with prompts.txt; return them."""
    target = folder / f"step-{step:06d}"
    target.mkdir(parents=True, exist_ok=True)
    pairs = enumerate(zip(prompts, videos_NCTHW, strict=False))
    clips = [Clip(target / f"{i:02d}.mp4", prompt, video, fps) for i, (prompt, video) in pairs]
    for clip in clips:
        write_video(clip.path, clip.video_CTHW, fps)
    lines = [f"{clip.path.stem}\t{single_line(clip.prompt)}\n" for clip in clips]
    (target / PROMPTS).write_text("".join(lines), encoding="utf-8")
    return clips
