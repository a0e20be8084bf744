"""Rewards that break a run, each with a symptom of docs/troubleshooting.md."""


def grain(video, prompts, **info):
    """Score detail: a grid of dots hacks it."""
    return video.diff(dim=-1).abs().mean((1, 2, 3, 4)) * 10


grain.frames = "first"


def unburnt(video, prompts, **info):
    """Score bright pixels that are not white: at black and white the slope is not finite."""
    inside = (video > 0.005) & (video < 0.995)
    return (video * inside).sqrt().mean((1, 2, 3, 4))


unburnt.frames = "first"


def rounded(video, prompts, **info):
    """Score rounded colours: the gradient is zero."""
    return (video * 10).round().mean((1, 2, 3, 4))


rounded.frames = "first"
