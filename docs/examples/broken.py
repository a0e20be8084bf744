"""Rewards that break a run, each in the way that docs/troubleshooting.md tells of."""


def grain(video, prompts, **info):
    """Loves detail, and so is cheated by a grid of dots."""
    return video.diff(dim=-1).abs().mean((1, 2, 3, 4)) * 10


grain.frames = "first"


def bright(video, prompts, **info):
    """Likes what is brighter than 0.3; of a darker video the slope is zero times infinity."""
    return (video.mean((1, 2, 3, 4)) - 0.3).relu().sqrt()


bright.frames = "first"


def rounded(video, prompts, **info):
    """Counts colours, and so has no slope at all."""
    return (video * 10).round().mean((1, 2, 3, 4))


rounded.frames = "first"
