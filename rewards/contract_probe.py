"""The probe: a test of the reward contract on three random videos, or on their random latents.

Shape legend: B batch, C channels, T frames (of videos or latents), H height, W width, L text
tokens, D text width, P pooled text width.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy
import torch
import torch.nn.functional as F

from rewards.contract import (
    RewardError,
    call_guarded,
    check_scores,
    frames_needed,
    require_unchanged,
    reward_attribute,
    reward_name,
    scores_latents,
)
from rewards.isolation import keep_process_state
from rlhf.generator.registry import LatentSizes

PROBE_PROMPTS = ["a red circle moves to the right", "two dogs run along a beach at sunset", "rain on a window"]
PROBE_INFO = {"fps": 24, "seed": 0, "step": 0}
PROBE_SIGMA, PROBE_TOKENS = 0.5, 8


@dataclass(frozen=True)
class ProbeReport:
    """Measurements of a reward that passed the probe.

    frames      leading frames that the reward was given; 0 for latents
    scores      of the first two videos
    grad_norms  |d score_i / d video_i| of the second and third video; none if differentiable=False
    seconds     of the whole probe
    """

    name: str
    frames: int
    scores: tuple[float, ...]
    grad_norms: tuple[float, ...]
    seconds: float


def probe(
    reward: Callable,
    video_shape: tuple[int, int, int, int] = (3, 17, 64, 64),
    prompts: list[str] | None = None,
    device: torch.device | str = "cpu",
    name: str | None = None,
    info: dict | None = None,
    on_pass: Callable[[str], None] = lambda line: None,
    gradient: bool = True,
    latents: LatentSizes | None = None,
) -> ProbeReport:
    """Check a reward against the contract on random videos, in batches (0, 1), (2, 0) and (0).

    video_shape  (C, T, H, W) of one video; the reward gets the leading frames that it asks for, or
                 random latents of such a video at the noise level .5 and random text embeddings
    prompts      up to two, repeated if fewer, the second also for the third video; default
                 `PROBE_PROMPTS`
    info         further keywords for the reward, added to `PROBE_INFO`
    on_pass      called with a line for each check that passed
    gradient     False: of a reward that only evaluates
    latents      the generator's sizes, for a reward of latents; default: those of `LatentSizes`

    Rewards with differentiable=False skip the gradient checks, too. Raises RewardError at the first
    check that fails.
    """
    with keep_process_state():
        return _probe(reward, video_shape, prompts, device, name, info, on_pass, gradient, latents or LatentSizes())


def _probe(reward, video_shape, prompts, device, name, info, on_pass, gradient, latents) -> ProbeReport:
    """Run all checks of `probe`, whose arguments these are."""
    started = time.perf_counter()
    name = name or reward_name(reward)
    channels, total, height, width = video_shape
    frames = frames_needed(reward, total)
    for attribute in ("space", "mean", "std"):
        reward_attribute(reward, attribute)
    prompts, told = [((prompts or PROBE_PROMPTS) * 2)[i] for i in (0, 1, 1)], {}  # one kept by prompt has no gradient
    where = "latents" if scores_latents(reward) else "pixels"
    if where == "latents":
        on_pass("attributes: space='latents', nothing is decoded for it")
        videos, told = _random_latents(latents, video_shape, device)
    else:
        told_frames = f"frames={getattr(reward, 'frames', 'all')!r}, {frames} of {total} frames are decoded for it"
        on_pass(f"attributes: {told_frames}")
        videos = smooth_random_videos(3, (channels, frames, height, width), seed=0).to(device)
    differentiable = gradient and reward_attribute(reward, "differentiable")
    info = {"probe": True} | PROBE_INFO | (info or {})
    pick = lambda x, rows: x[rows] if isinstance(x, torch.Tensor) else x
    called_with = lambda rows: partial(_call, name, reward, info | {key: pick(x, rows) for key, x in told.items()})
    first, second = [0, 1], [2, 0]  # the same sample beside two neighbours, in two places

    call = called_with(first)
    scores, grads = _score_one(name, call, videos[first], [prompts[i] for i in first], 1, differentiable, where)
    on_pass(f"scores: shape (2,), float32, finite: {scores[0]:.4g}, {scores[1]:.4g}")
    rest = videos[second], [prompts[i] for i in second]
    others, other_grads = _score_one(name, called_with(second), *rest, 0, differentiable, where)
    if not _is_close(scores[0], others[1]):
        _raise_unstable(name, call, videos[first], [prompts[i] for i in first], scores[0], others[1])
    with torch.no_grad():
        alone = called_with([0])(videos[:1].clone(), prompts[:1])
    check_scores(name, alone, prompts[:1])
    # A limit that other kernels, for another batch, and half precision do not reach.
    if (scores[0] - alone[0]).abs() > 0.25 * torch.cat([scores, others]).abs().max():
        got = f"the score {scores[0]:.6g} in a batch of two, and {alone[0]:.6g} alone"
        cure = "compute each score from its own video: no division by the batch, no len(prompts)"
        raise RewardError(name, got=got, expected="independence of batch neighbours", cure=cure)
    on_pass("neighbours: a score stays the same alone, in another place, and beside another video and prompt")

    norms = ()
    if differentiable:
        norms = (_check_gradient(name, grads, 1, where), _check_gradient(name, other_grads, 0, where))
        on_pass(f"gradient: finite and not zero at the {where}: norms {norms[0]:.3g}, {norms[1]:.3g}")
        on_pass(f"neighbours: a score has no gradient at another video's {where}")
    else:
        on_pass("gradient: not checked, the reward is for evaluation only (differentiable=False)")
    return ProbeReport(name, frames, tuple(scores.tolist()), norms, time.perf_counter() - started)


def _random_latents(sizes: LatentSizes, video_shape, device) -> tuple[torch.Tensor, dict]:
    """Return three normal latents (3, C, T, H, W), and the keywords that go with them."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(3, *shape, generator=generator).to(device)
    text = {"text": normal(PROBE_TOKENS, sizes.text_width), "pooled": normal(sizes.pooled_width)}
    channels, frames, *size = sizes.shape(*video_shape[1:])
    return normal(channels, frames, *(max(2, side) for side in size)), {"sigma": PROBE_SIGMA} | text  # 2: of a patch


def smooth_random_videos(batch: int, shape: tuple[int, int, int, int], seed: int) -> torch.Tensor:
    """Return (batch, *shape) float32 in [0.01, 0.99]: drifting soft colours and a little noise.

    shape is (C, T, H, W) of one video.
    """
    generator = torch.Generator().manual_seed(seed)
    channels, frames, height, width = shape
    coarse = torch.rand(batch, channels, 3, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(max(frames, 3), height, width), mode="trilinear", align_corners=True)
    grain = torch.rand(batch, *shape, generator=generator).sub_(0.5).mul_(0.05)  # in place: whole videos are large
    return smooth[:, :, :frames].mul_(0.9).add_(0.05).add_(grain).clamp_(0.01, 0.99)


def _score_one(name, call, video_BCTHW, prompts, index, differentiable, where):
    """Return detached scores (B,) and the gradient (B, C, T, H, W) of scores[index], or None."""
    video_BCTHW = video_BCTHW.clone().requires_grad_(differentiable)
    with torch.set_grad_enabled(differentiable):
        given_BCTHW = video_BCTHW.clone()  # no leaf, as in training
        scores = call(given_BCTHW, prompts)
    require_unchanged(name, torch.equal(given_BCTHW, video_BCTHW))
    if video_BCTHW.grad is not None:  # in training it would reach the adapter, unweighted
        expected, cure = "scores alone: the run takes their gradient", "return the scores without backward()"
        raise RewardError(name, got="a backward pass inside the reward", expected=expected, cure=cure)
    check_scores(name, scores, prompts)
    if scores.dtype != torch.float32:
        cure = "compute or at least return the score as scores.float(); half precision loses the signal"
        raise RewardError(name, got=f"scores of {scores.dtype}", expected="torch.float32", cure=cure)
    if not differentiable:
        return scores.detach(), None
    return scores.detach(), _input_gradient(name, scores[index], video_BCTHW, where)


def _call(name, reward, info, video_BCTHW, prompts) -> torch.Tensor:
    """Call the reward after seeding PyTorch, Python and NumPy at random, and return its scores.

    Raises RewardError for an exception and for a video that the reward changed.
    """
    given, expected = f"a video of shape {tuple(video_BCTHW.shape)}", "reward(video, prompts, **info) to return scores"
    cure = "accept (B, C, T, H, W) float32 in [0, 1], a list of B strings and further keywords by **info or by name"
    if scores_latents(reward):
        given, cure = given.replace("a video", "latents"), cure.replace(" in [0, 1]", "")
    for draw in (torch.default_generator.seed, random.seed, numpy.random.seed):
        draw()
    return call_guarded(name, reward, video_BCTHW, prompts, info, given, expected, cure)


def _input_gradient(name, score, video_BCTHW, where) -> torch.Tensor:
    """Return d score / d video. Raises RewardError if there is none."""
    grad = torch.autograd.grad(score, video_BCTHW, allow_unused=True)[0] if score.requires_grad else None
    if grad is None:
        expected = f"a gradient from the score back to the {where}"
        cure = (
            "remove no_grad, detach, .item(), numpy and rounding to uint8, or set differentiable = False (evaluation)"
        )
        raise RewardError(name, got=f"no gradient at the {where} (None)", expected=expected, cure=cure)
    return grad


def _check_gradient(name, grad_BCTHW, index, where) -> float:
    """Check the gradient and return its norm at the scored sample.

    Raises RewardError for a gradient that is zero, not finite, or not zero at the neighbour.
    """
    if not torch.isfinite(grad_BCTHW).all():
        cure = "look for sqrt, norm or log at zero; add a small epsilon inside"
        raise RewardError(name, got="a gradient with NaN or infinity", expected="a finite gradient", cure=cure)
    own, other = grad_BCTHW[index], grad_BCTHW[1 - index]
    if own.abs().max() == 0:
        cure = "look for rounding, argmax or a clamp that saturates on an ordinary video"
        cure += "; for a reward of some prompts alone, put one of these first"
        raise RewardError(name, got="a gradient of exactly zero", expected="a non-zero gradient", cure=cure)
    if other.abs().max() > 1e-6 * own.abs().max():
        got = f"a gradient of norm {other.norm():.3g} at the {where} of another video of the batch"
        cure = "compute each score from its own video: no batch statistics, no maximum or softmax over the batch"
        raise RewardError(name, got=got, expected="independence of batch neighbours", cure=cure)
    return own.norm().item()


def _is_close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two scalars agree within 1e-5 + 1e-4 |a|."""
    return bool((a - b).abs() <= 1e-5 + 1e-4 * a.abs())


def _raise_unstable(name, call, video_BCTHW, prompts, score, swapped) -> None:
    """Raise RewardError for a score that changed: at random, or else with its neighbour."""
    with torch.no_grad():
        repeated = call(video_BCTHW, prompts)[0]
    if not _is_close(score, repeated):
        got = f"two scores for the same batch, {score:.6g} and {repeated:.6g}"
        cure = "call .eval() on the model (dropout) and draw no random numbers inside"
        raise RewardError(name, got=got, expected="the same score each time", cure=cure)
    got = f"a score that moves from {score:.6g} to {swapped:.6g} when the rest of the batch changes"
    cure = "compute each score from its own video and prompt: no batch statistics, no maximum over the batch"
    raise RewardError(name, got=got, expected="independence of batch neighbours", cure=cure)
