"""Rewards that break a run, each in the way that docs/troubleshooting.md tells of."""


def grain(video, prompts, **info):
    """Loves detail, and so is cheated by a grid of dots."""
    return video.diff(dim=-1).abs().mean((1, 2, 3, 4)) * 10


grain.frames = "first"


def unburnt(video, prompts, **info):
    """Likes what is bright but not white; of a white or black pixel the slope is infinity times zero."""
    inside = (video > 0.005) & (video < 0.995)
    return (video * inside).sqrt().mean((1, 2, 3, 4))


unburnt.frames = "first"


def rounded(video, prompts, **info):
    """Counts colours, and so has no slope at all."""
    return (video * 10).round().mean((1, 2, 3, 4))


rounded.frames = "first"
