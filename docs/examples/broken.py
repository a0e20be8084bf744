"""Rewards that break a run, each in the way that docs/troubleshooting.md tells of."""


def grain(video, prompts, **info):
    """Loves detail, and so is cheated by a grid of dots."""
    return video.diff(dim=-1).abs().mean((1, 2, 3, 4)) * 10


grain.frames = "first"


def darkness(video, prompts, **info):
    """Has an infinite slope where a pixel is quite white."""
    return (1 - video).clamp(min=0).sqrt().mean((1, 2, 3, 4))


darkness.frames = "first"


def rounded(video, prompts, **info):
    """Counts colours, and so has no slope at all."""
    return (video * 10).round().mean((1, 2, 3, 4))


rounded.frames = "first"
