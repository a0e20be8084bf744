"""Scores of a step's samples: decoded if a reward sees pixels, with or without gradient."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import torch

from rewards import RewardError, RewardMix
from rewards.contract import NoisyLatents
from rlhf.distributed.layout import Layout
from rlhf.generator.wan_decoder import saturated_share
from rlhf.method.decode import Decoder
from rlhf.method.losses import score, start_score
from rlhf.method.options import SCORES_ALONE, MethodOptions
from rlhf.method.plan import Sample
from rlhf.training.batches import BatchResult
from rlhf.types import Conditioning

# () -> scores (B,), their gradient at the latents or None, and what is logged of the batch
Finish = Callable[[], tuple[torch.Tensor, torch.Tensor | None, BatchResult]]


@dataclass(frozen=True)
class Scorer:
    """Scores samples of the current model by a run's rewards. fps: frames per second of a video."""

    rewards: RewardMix
    decode: Decoder
    layout: Layout
    method: str
    options: MethodOptions
    fps: int
    seed: int

    def info(self, step: int) -> dict:
        """Return the `info` keyword arguments of rewards in a step: fps, seed and step."""
        return {"fps": self.fps, "seed": self.seed, "step": step}

    def score(
        self, sample: Sample, prompts: list[str], cond: Conditioning, step: int
    ) -> tuple[torch.Tensor, BatchResult]:
        """Decode and score a sample; return the scores (B,) with graph, and what is logged."""
        options, info, error = self.options, self.info(step), None
        video, latents = self._views(sample, cond, step)
        how = options.relative_words, options.relative_strength, sample.penalty, options.reward_perturbation
        try:
            scores_B, raw = score(self.rewards, video, prompts, info | {"latents": latents}, *how)
        except RewardError as raised:  # `step` tells every process, then all of them stop
            error, scores_B = raised, latents.latents_BCTHW.mean((1, 2, 3, 4)) * math.nan
            raw = dict.fromkeys(self.rewards.rewards, scores_B.detach())
        seen = None if video is None else video.detach()
        told = info | {"latents": replace(latents, latents_BCTHW=latents.latents_BCTHW.detach())}
        return scores_B, BatchResult(_columns(scores_B, raw, video), (seen, prompts, told), error)

    def begin(self, latents_BCTHW: torch.Tensor, prompts: list[str], cond: Conditioning, step: int) -> Finish:
        """Begin to score latents for a regression, with their gradient if the method uses it."""
        begin = self._begin_scores if self.method in SCORES_ALONE else self._score_with_gradient
        return begin(latents_BCTHW, prompts, cond, step)

    def _views(self, sample: Sample, cond: Conditioning, step: int) -> tuple[torch.Tensor | None, NoisyLatents]:
        """Return a sample's video, None if no reward sees it, and its latents for rewards."""
        average = self.layout.average_grad
        noisy = NoisyLatents(
            average(sample.scored_latents), sample.sigma, cond.prompt_embeds_BLD, cond.pooled_embeds_BP
        )
        return self.decode(average(sample.latents), step), noisy

    def _score_with_gradient(
        self, latents_BCTHW: torch.Tensor, prompts: list[str], cond: Conditioning, step: int
    ) -> Finish:
        """Score at once, with the gradient at the latents; return a function that returns both."""
        sample = Sample(latents_BCTHW.requires_grad_())
        scores_B, scored = self.score(sample, prompts, cond, step)
        (gradient,) = torch.autograd.grad(scores_B.sum(), sample.latents)
        return partial(tuple, (scores_B.detach(), gradient, scored))

    @torch.no_grad()
    def _begin_scores(self, latents_BCTHW: torch.Tensor, prompts: list[str], cond: Conditioning, step: int) -> Finish:
        """Begin to score without a gradient, and return a function that waits for the scores."""
        video, latents = self._views(Sample(latents_BCTHW), cond, step)
        info, words = self.info(step) | {"latents": latents}, self.options.relative_words
        try:
            finish = start_score(self.rewards, video, prompts, info, words, self.options.relative_strength)
        except RewardError as raised:
            finish = partial(_raise, raised)
        saturated, device = _saturated(video), latents_BCTHW.device

        def collect() -> tuple[torch.Tensor, None, BatchResult]:
            error = None
            try:
                scores_B, raw = finish()
            except RewardError as raised:  # as above
                error, scores_B = raised, torch.full((len(prompts),), math.nan, device=device)
                raw = dict.fromkeys(self.rewards.rewards, scores_B)
            return scores_B, None, BatchResult(_columns(scores_B, raw) | saturated, error=error)

        return collect


def _raise(error: Exception) -> NoReturn:
    """Raise the error, for use as a `Finish`."""
    raise error


def _columns(
    scores_B: torch.Tensor, raw: dict[str, torch.Tensor], video_BCTHW: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return the columns (B,) that are logged of total and raw scores, and of a video."""
    scores = {"reward": scores_B.detach()} | {f"rewards/{name}": raw_B for name, raw_B in raw.items()}
    return scores | _saturated(video_BCTHW)


def _saturated(video_BCTHW: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return the column of saturated shares, {} without a video."""
    return {} if video_BCTHW is None else {"saturated": saturated_share(video_BCTHW)}
