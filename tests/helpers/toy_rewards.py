"""Rewards of one line, prompts for them, and the metrics of a run that two equal runs share."""

from pathlib import Path

from rlhf.config import RewardGradientConfig
from rlhf.run.metrics import COST, read_metrics


def redness(video, prompts, **info):
    """A reward with an opinion: red up, blue down, over all frames."""
    return (video[:, 0] - video[:, 2]).mean((1, 2, 3)) * 10


def count(video, prompts, **info):
    """A reward that only counts, without a gradient."""
    return (redness(video.detach(), prompts) * 50).round()


count.differentiable = False


def calm(latents, prompts, *, sigma, **info):
    """A reward of latents: quiet ones, and red-hot first channels, the more the less noise there is."""
    return latents[:, 0].mean((1, 2, 3)) * (2 - sigma) - latents.square().mean((1, 2, 3, 4))


calm.space = "latents"


def brightness(video, prompts, **info):
    return video.mean((1, 2, 3, 4))


def rows_without_cost(args: RewardGradientConfig) -> list[dict]:
    """The metrics of a run without what differs between equal runs."""
    return [{k: v for k, v in row.items() if k not in COST} for row in read_metrics(Path(args.output_dir))]


# What may stand beside any method: both perturbations, the lower of two rewards, cosine, feed-forward layers.
ROBUST = {
    "method_kwargs": {"reward_perturbation": 0.01, "weight_perturbation": 0.1},
    "reward_mix": "min",
    "lr_scheduler_type": "cosine",
    "lora_target_modules": ["all-linear"],
}
PROMPTS = ["a red fox", "two blue birds", "rain", "a town at night", "the sea", "one leaf falls"]
