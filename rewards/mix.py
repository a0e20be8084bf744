"""The total of several rewards; each sees only the frames that it asked for, or the latents.

Shape legend: B batch, C channels, T frames, H height, W width, N base samples.
"""

import math
from collections.abc import Callable

import torch

from rewards.contract import (
    NoisyLatents,
    RewardError,
    at_least_float32,
    call_guarded,
    check_scores,
    frames_needed,
    leading_info,
    require_differentiable,
    require_graph,
    reward_attribute,
    scores_latents,
)
from rewards.remote import Remote


class RewardMix:
    """The weighted sum of rewards, or the lowest of them, that also returns each raw score.

    A raw score goes through these steps, each of which is optional:
        1. cap c: min(score, c), so that there is no gradient above c; or target t: -|score - t|
        2. normalise: subtract the mean (unless there is a target), divide by the standard deviation
        3. balance: scale the gradient at each video's pixels to unit length
        4. multiply by the weight; a reward of weight 0 is only reported, without gradient
    The total is the sum of the results, or with `lowest` the smallest of them in each video.

    normalise uses the `mean` and `std` that a reward states until `calibrate` has measured them. A
    reward with neither is not normalised. caps and targets are given by name, in units of the raw
    score. Raises ValueError for weights, caps or targets that don't fit the rewards.
    """

    def __init__(
        self,
        rewards: dict[str, Callable],
        weights: list[float] | None = None,
        normalise: bool = True,
        caps: dict[str, float] | None = None,
        targets: dict[str, float] | None = None,
        balance: bool = False,
        lowest: bool = False,
    ):
        weights = [1.0] * len(rewards) if weights is None else list(weights)
        if not rewards or len(weights) != len(rewards):
            raise ValueError(
                f"reward_weights: got {len(weights)} weights for {len(rewards)} rewards "
                f"({', '.join(rewards) or 'none'}); expected at least one reward and one weight for each. "
                "Give reward_weights as many entries as reward_funcs."
            )
        self.rewards, self.weights, self.normalise = dict(rewards), dict(zip(rewards, weights, strict=True)), normalise
        self.caps, self.targets, self.balance = caps or {}, targets or {}, balance
        self.lowest = lowest
        _check_limits(self.caps, self.targets, list(rewards))
        self.statistics = {name: _stated_statistics(reward) for name, reward in self.rewards.items()}
        self.frames = _max_frames(self.rewards.values())

    @property
    def latent_rewards(self) -> list[str]:
        """The names of the rewards that score latents."""
        return [name for name, reward in self.rewards.items() if scores_latents(reward)]

    def to(self, device: torch.device | str) -> "RewardMix":
        """Move the rewards that are modules; the others compute on the device of the video."""
        for reward in self.rewards.values():
            if isinstance(reward, torch.nn.Module):
                reward.to(device)
        return self

    def calibrate(self, scores: dict[str, torch.Tensor]) -> None:
        """Normalise by mean and standard deviation of these raw scores (N,) of base samples.

        Raises RewardError for a reward whose scores differ by no more than float32 rounding.
        """
        for name, scores_N in scores.items():
            mean, std = scores_N.double().mean().item(), scores_N.double().std().item()
            if self.weights[name] != 0 and not has_spread(scores_N):
                got = f"a standard deviation of {std} over {len(scores_N)} base samples"
                cure = "look whether the reward is saturated on them, calibrate on more, or state its mean and std"
                raise RewardError(name, got=got, expected="scores that differ", cure=cure)
            self.statistics[name] = (mean, std)

    def __call__(
        self, video_BCTHW: torch.Tensor | None, prompts: list[str], latents: NoisyLatents | None = None, **info
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the total (B,) float32 and the raw scores {name: (B,) float32, detached}.

        Each reward gets the video or the latents, whichever it scores; what none scores may be
        None. `info` is passed on to every reward, and with it the row of each prompt. Raises
        RewardError, with reward and prompt, for scores that are not finite or have the wrong shape,
        and in training for those of a trained reward that have no gradient.
        """
        terms, breakdown = [], {}
        for name in self.rewards:
            x, told = self._input(name, video_BCTHW, latents, info)
            trained = torch.is_grad_enabled() and x.requires_grad and self.weights[name] != 0
            term = self._score_balanced if self.balance and trained else self._score_and_transform
            breakdown[name], term_B = term(name, x, prompts, told)
            if self.weights[name] != 0:
                terms.append(self.weights[name] * term_B)
        return self._total(terms, torch.zeros(len(prompts), device=x.device)), breakdown

    def _input(self, name, video_BCTHW, latents, info) -> tuple[torch.Tensor, dict]:
        """Return what a reward scores, and its info. Raises RewardError if there are no latents."""
        if name not in self.latent_rewards:
            return video_BCTHW, info
        if latents is None:
            cure = "score with it in a run, by reward_funcs or eval_reward_funcs"
            raise RewardError(name, got="decoded videos alone", expected="their latents (space 'latents')", cure=cure)
        return latents.latents_BCTHW, info | latents.info

    def _total(self, terms: list[torch.Tensor], zeros_B: torch.Tensor) -> torch.Tensor:
        """Return the sum of terms (B,), or the lowest of them in each video; zeros without any."""
        return torch.stack(terms).amin(0) if self.lowest and terms else sum(terms, zeros_B)

    @torch.no_grad()
    def start(
        self, video_BCTHW: torch.Tensor | None, prompts: list[str], latents: NoisyLatents | None = None, **info
    ) -> Callable[[], tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """Begin to score without gradient; return a function that returns what a call does.

        Rewards that another process serves compute until it is called, the others before.
        """
        waiting = {}
        for name, reward in self.rewards.items():
            if isinstance(reward, Remote):
                frames = frames_needed(reward, video_BCTHW.shape[2])
                waiting[name] = reward.start(video_BCTHW[:, :, :frames], prompts, **leading_info(info, frames))
        scores = {}
        for name in (name for name in self.rewards if name not in waiting):
            x, told = self._input(name, video_BCTHW, latents, info)
            scores[name] = self._score(name, x, prompts, told)

        def finish() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            for name, wait in waiting.items():
                check_scores(name, scored := wait(), prompts)
                scores[name] = at_least_float32(scored)
            raw = {name: scores[name] for name in self.rewards}
            terms = [self.weights[name] * self._transform(name, raw[name]) for name in raw if self.weights[name] != 0]
            return self._total(terms, torch.zeros_like(next(iter(raw.values())))), raw

        return finish

    def _score_and_transform(self, name, video_BCTHW, prompts, info):
        """Return the raw scores (B,), detached, and the transformed scores (B,)."""
        scores_B = self._score(name, video_BCTHW, prompts, info)
        return scores_B.detach(), self._transform(name, scores_B)

    def _score_balanced(self, name, video_BCTHW, prompts, info):
        """Return raw and transformed scores (B,), with pixel gradients of unit length, or zero.

        The gradient is computed here, which frees the reward's graph. A term of value zero passes
        it on. Raises RewardError for a gradient that is not finite, since scaling would make the
        total not finite either.
        """
        pixels_BCTHW = video_BCTHW.detach().requires_grad_()
        scores_B, term_B = self._score_and_transform(name, pixels_BCTHW, prompts, info)
        (grad_BCTHW,) = torch.autograd.grad(term_B.sum(), pixels_BCTHW)  # scores know nothing of their neighbours
        norm_B = grad_BCTHW.flatten(1).norm(dim=1)
        if bad := (~torch.isfinite(norm_B)).nonzero().flatten().tolist():
            got = f"a gradient of norm {norm_B[bad[0]].item()} at the pixels for prompt {prompts[bad[0]]!r}"
            cure = "look for sqrt, norm or log at zero; add a small epsilon inside"
            raise RewardError(name, got=got, expected="a finite gradient", cure=cure)
        unit_BCTHW = grad_BCTHW / torch.where(norm_B > 0, norm_B, 1.0).reshape(-1, 1, 1, 1, 1)
        zeros_B = (unit_BCTHW * (video_BCTHW - video_BCTHW.detach())).sum((1, 2, 3, 4))
        return scores_B, term_B.detach() + zeros_B

    def _score(self, name, video_BCTHW, prompts, info) -> torch.Tensor:
        """Return checked raw scores (B,), with gradient only if the weight is not 0."""
        reward = self.rewards[name]
        with_gradient = torch.is_grad_enabled() and self.weights[name] != 0
        if with_gradient and video_BCTHW.requires_grad:
            require_differentiable(name, reward)
        told = f"the prompts {prompts}", "scores of these videos", "correct the reward where it failed"
        with torch.set_grad_enabled(with_gradient):
            scores_B = call_guarded(name, reward, video_BCTHW, prompts, info, *told)
        check_scores(name, scores_B, prompts, video_BCTHW)
        if with_gradient and video_BCTHW.requires_grad:
            require_graph(name, scores_B)
        return at_least_float32(scores_B)

    def _transform(self, name, scores_B: torch.Tensor) -> torch.Tensor:
        """Return scores (B,) after cap or target and normalisation."""
        mean, std = self.statistics[name] if self.normalise and self.statistics[name] else (0.0, 1.0)
        if name in self.targets:
            return -(scores_B - self.targets[name]).abs() / std
        return (scores_B.clamp(max=self.caps.get(name, math.inf)) - mean) / std


def has_spread(scores_N: torch.Tensor) -> bool:
    """Return whether the standard deviation of scores (N,) is finite and above float32 rounding."""
    spread = scores_N.double().std().item() if len(scores_N) > 1 else 0.0
    return 1e-6 * scores_N.abs().max().item() < spread < math.inf


def _check_limits(caps: dict[str, float], targets: dict[str, float], names: list[str]) -> None:
    """Raise ValueError for unknown names, values that are not finite, and names in both."""
    for key, given in (("caps", caps), ("targets", targets)):
        for name, value in given.items():
            if name not in names:
                raise ValueError(f"{key}: got {name!r}, expected one of {', '.join(names)}; correct the name.")
            if not math.isfinite(value):
                raise ValueError(f"{key}: got {value} for {name!r}, expected a finite number; correct it.")
    if both := caps.keys() & targets.keys():
        raise ValueError(f"caps and targets: got {', '.join(both)} in both, expected each in one; leave one out.")


def _stated_statistics(reward) -> tuple[float, float] | None:
    """Return the mean and std that a reward states for itself, None without std."""
    mean, std = reward_attribute(reward, "mean"), reward_attribute(reward, "std")
    return None if std is None else (mean or 0.0, std)


def _max_frames(rewards) -> str | int:
    """Return the most leading frames that any of the rewards needs, or "all"."""
    asked = [reward_attribute(reward, "frames") for reward in rewards if not scores_latents(reward)]
    return "all" if "all" in asked else max((1 if frames == "first" else frames for frames in asked), default=1)
