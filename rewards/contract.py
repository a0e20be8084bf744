"""The reward contract and the probe that checks it.

A reward is a plain callable; it needs to import nothing from here:

    def reward(video, prompts, **info):    # (B, C, T, H, W) float32 in [0, 1], gradient attached; list of B strings
        return scores                      # (B,) float32, higher is better

`info` holds at least `fps`, the frame rate of the video, and `seed` and `step`, from which all that is random comes.
A reward with weights may also offer a classmethod `random_init(**settings)`: itself at full size with random weights,
made on torch's default device and reading neither hub nor disk; settings are those of the constructor that name no
weights. The benchmark and the tests of the published layouts build it so.

Shape legend: B batch, C channels, T frames, H height, W width.
"""

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F

# Optional attributes of a reward and what holds where it states none.
ATTRIBUTE_DEFAULTS = {
    "frames": "all",  # what must be decoded: "first" (one leading frame), an int (that many leading frames) or "all"
    "space": "pixels",  # what is scored: decoded pixels
    "mean": None,  # typical score, for mixing; states nothing unless std is stated too
    "std": None,  # typical spread of the score, for mixing, > 0
    "differentiable": True,  # False: for evaluation only, never trained on
}


class Reward(Protocol):
    """The shape of a reward. The attributes are optional; `ATTRIBUTE_DEFAULTS` says what holds without them."""

    frames: Literal["first", "all"] | int
    space: str
    mean: float | None
    std: float | None
    differentiable: bool

    def __call__(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor: ...


class RewardError(ValueError):
    """A reward that breaks the contract or can't be loaded: who, what was got, what was expected, and the cure."""

    def __init__(self, name: str, *, got: str, expected: str, cure: str):
        self.name, self.got, self.expected, self.cure = name, got, expected, cure
        super().__init__(f"reward {name!r}: got {got}; expected {expected}. {cure[:1].upper()}{cure[1:]}.")


def reward_name(reward: Callable) -> str:
    """The name for messages: the reward's own `name`, else that of its function or class."""
    return getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__


def reward_attribute(reward: Callable, attribute: str) -> Any:
    """An attribute of the contract, or its default. Raises RewardError for a value outside the contract."""
    value = getattr(reward, attribute, ATTRIBUTE_DEFAULTS[attribute])
    if attribute == "frames":
        check_frames(reward_name(reward), value)
    if attribute == "space" and value != "pixels":
        expected = "'pixels', the only space that is scored here"
        raise RewardError(
            reward_name(reward), got=f"space={value!r}", expected=expected, cure="score the decoded video"
        )
    if attribute in ("mean", "std") and value is not None and not _is_statistic(value, attribute == "std"):
        expected = "a number above 0, or None" if attribute == "std" else "a finite number, or None"
        cure = f"state {'the typical spread of the' if attribute == 'std' else 'a typical'} score, or drop mean and std"
        cure = "write it as a number; YAML takes 1e-2 for text, but not 0.01" if isinstance(value, str) else cure
        raise RewardError(reward_name(reward), got=f"{attribute}={value!r}", expected=expected, cure=cure)
    return value


def _is_statistic(value: Any, above_zero: bool) -> bool:
    try:
        number = math.nan if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError):
        return False
    return math.isfinite(number) and (number > 0 or not above_zero)


def check_frames(name: str, frames: Any) -> None:
    """Raise RewardError for a `frames` outside the contract; name: the reward's."""
    is_count = isinstance(frames, int) and not isinstance(frames, bool) and frames >= 1
    if not is_count and frames not in ("first", "all"):
        expected = "'first', 'all' or a number of leading frames of at least 1"
        cure = "correct the reward's frames attribute"
        raise RewardError(name, got=f"frames={frames!r}", expected=expected, cure=cure)


def frames_needed(reward: Callable, total: int) -> int:
    """How many leading frames of a video of `total` frames the reward looks at: between 1 and total."""
    frames = reward_attribute(reward, "frames")
    if frames == "all":
        return total
    return 1 if frames == "first" else min(frames, total)


def check_scores(name: str, scores: Any, prompts: list[str], video_BCTHW: torch.Tensor | None = None) -> None:
    """Raise RewardError unless scores is a finite floating tensor of shape (B,), B = len(prompts).

    video_BCTHW: what was scored, to tell a reward that breaks from a video that is broken already.
    """
    batch = len(prompts)
    if not isinstance(scores, torch.Tensor):
        got, cure = f"a {type(scores).__name__}", "return one score for each video as a tensor"
        raise RewardError(name, got=got, expected=f"a tensor of shape ({batch},)", cure=cure)
    if tuple(scores.shape) != (batch,):
        got, cure = f"scores of shape {tuple(scores.shape)}", "reduce over everything but the batch, keep the batch"
        raise RewardError(name, got=got, expected=f"shape ({batch},), one score a video", cure=cure)
    if not scores.is_floating_point():
        cure = "return scores.float()"
        raise RewardError(name, got=f"scores of {scores.dtype}", expected="torch.float32", cure=cure)
    bad = (~torch.isfinite(scores.detach())).nonzero().flatten().tolist()
    if bad:
        got = f"the score {scores[bad[0]].item()} for prompt {prompts[bad[0]]!r}"
        if video_BCTHW is not None and not torch.isfinite(video_BCTHW[bad[0]]).all():
            cure = "lower learning_rate, or look at guidance_scale and dtype: it is the model that has diverged"
            raise RewardError(name, got=f"{got}, and pixels that are no numbers", expected="a finite video", cure=cure)
        cure = "look for a division by zero, a logarithm or root of zero, or half precision that overflows"
        raise RewardError(name, got=got, expected="a finite number", cure=cure)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Cast half precision up; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------- the probe

PROBE_PROMPTS = ["a red circle moves to the right", "two dogs run along a beach at sunset", "rain on a window"]
PROBE_INFO = {"fps": 24, "seed": 0, "step": 0}


@dataclass(frozen=True)
class ProbeReport:
    """What the probe saw of a reward that kept the contract."""

    name: str
    frames: int  # leading frames that it was given
    scores: tuple[float, ...]  # of two random videos
    grad_norms: tuple[float, ...]  # |d score_i / d video_i|; empty for differentiable=False
    seconds: float  # for the whole probe


def probe(
    reward: Callable,
    video_shape: tuple[int, int, int, int] = (3, 17, 64, 64),
    prompts: list[str] | None = None,
    device: torch.device | str = "cpu",
    name: str | None = None,
    info: dict | None = None,
    on_pass: Callable[[str], None] = lambda line: None,
) -> ProbeReport:
    """Check a reward against the contract on two random smooth videos.

    video_shape is (C, T, H, W) of one video; the reward gets the leading frames that it asks for. prompts: two or three
    (repeated if fewer). info: what the reward is told besides, over `PROBE_INFO`. `on_pass` is told each check that
    passed. Rewards with differentiable=False skip the gradient checks. Raises RewardError at the first that fails.
    """
    started = time.perf_counter()
    name = name or reward_name(reward)
    channels, total, height, width = video_shape
    frames = frames_needed(reward, total)
    for attribute in ("space", "mean", "std"):
        reward_attribute(reward, attribute)
    on_pass(f"attributes: frames={getattr(reward, 'frames', 'all')!r}, {frames} of {total} frames are decoded for it")

    prompts = [((prompts or PROBE_PROMPTS) * 3)[i] for i in range(3)]
    videos = smooth_random_videos(3, (channels, frames, height, width), seed=0).to(device)
    differentiable = reward_attribute(reward, "differentiable")
    first, again = [0, 1], [0, 2]  # the same sample beside two neighbours
    call = partial(_call, name, reward, {"probe": True} | PROBE_INFO | (info or {}))

    scores, grads = _score_one(name, call, videos[first], [prompts[i] for i in first], 0, differentiable)
    on_pass(f"scores: shape (2,), float32, finite: {scores[0]:.4g}, {scores[1]:.4g}")
    swapped, swapped_grads = _score_one(name, call, videos[again], [prompts[i] for i in again], 1, differentiable)
    if not _close(scores[0], swapped[0]):
        _raise_unstable(name, call, videos[first], [prompts[i] for i in first], scores[0], swapped[0])
    on_pass("neighbours: a score stays the same beside another video and prompt")

    norms = ()
    if differentiable:
        norms = (_check_gradient(name, grads, 0), _check_gradient(name, swapped_grads, 1))
        on_pass(f"gradient: finite and not zero at the pixels: norms {norms[0]:.3g}, {norms[1]:.3g}")
        on_pass("neighbours: a score has no gradient at another video's pixels")
    else:
        on_pass("gradient: not checked, the reward says differentiable=False (evaluation only)")
    return ProbeReport(name, frames, tuple(scores.tolist()), norms, time.perf_counter() - started)


def smooth_random_videos(batch: int, shape: tuple[int, int, int, int], seed: int) -> torch.Tensor:
    """(B, C, T, H, W) float32 inside (0, 1): soft colours that drift and change, with a little grain."""
    generator = torch.Generator().manual_seed(seed)
    channels, frames, height, width = shape
    coarse = torch.rand(batch, channels, 3, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(max(frames, 3), height, width), mode="trilinear", align_corners=True)
    grain = torch.rand(batch, *shape, generator=generator) - 0.5
    return (0.05 + 0.9 * smooth[:, :, :frames] + 0.05 * grain).clamp(0.01, 0.99)


def _score_one(name, call, video_BCTHW, prompts, index, differentiable):
    """Detached scores of the batch and, if differentiable, the gradient of scores[index] at all the pixels."""
    video_BCTHW = video_BCTHW.clone().requires_grad_(differentiable)
    with torch.set_grad_enabled(differentiable):
        scores = call(video_BCTHW, prompts)
    check_scores(name, scores, prompts)
    if scores.dtype != torch.float32:
        cure = "compute or at least return the score as scores.float(); half precision loses the signal"
        raise RewardError(name, got=f"scores of {scores.dtype}", expected="torch.float32", cure=cure)
    if not differentiable:
        return scores.detach(), None
    return scores.detach(), _pixel_gradient(name, scores[index], video_BCTHW)


def _call(name, reward, info, video_BCTHW, prompts):
    try:
        return reward(video_BCTHW, list(prompts), **info)
    except (RewardError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        got = raised(error, f"a video of shape {tuple(video_BCTHW.shape)}")
        expected = "reward(video, prompts, **info) to return scores"
        cure = "accept (B, C, T, H, W) float32 in [0, 1], a list of B strings and any further keywords (**info)"
        raise RewardError(name, got=got, expected=expected, cure=cure) from error


def raised(error: Exception, given: str) -> str:
    """What a reward raised for what it was given, caught where it was called, and the deepest line of its author's."""
    below = traceback.extract_tb(error.__traceback__)[1:]
    places = [f" ({frame.filename}, line {frame.lineno})" for frame in below if "site-packages" not in frame.filename]
    return f"{type(error).__name__}: {error}".rstrip(".") + f" for {given}" + "".join(places[-1:])


def _pixel_gradient(name, score, video_BCTHW) -> torch.Tensor:
    grad = torch.autograd.grad(score, video_BCTHW, allow_unused=True)[0] if score.requires_grad else None
    if grad is None:
        expected = "a gradient from the score back to the pixels"
        cure = (
            "remove no_grad, detach, .item(), numpy and rounding to uint8, or set differentiable = False (evaluation)"
        )
        raise RewardError(name, got="no gradient at the pixels (None)", expected=expected, cure=cure)
    return grad


def _check_gradient(name, grad_BCTHW, index) -> float:
    """The norm of the scored sample's own gradient: finite, above 0, and nothing at the neighbour."""
    if not torch.isfinite(grad_BCTHW).all():
        cure = "look for sqrt, norm or log at zero; add a small epsilon inside"
        raise RewardError(name, got="a gradient with NaN or infinity", expected="a finite gradient", cure=cure)
    own, other = grad_BCTHW[index], grad_BCTHW[1 - index]
    if own.abs().max() == 0:
        cure = "look for rounding, argmax or a clamp that saturates on an ordinary video"
        raise RewardError(name, got="a gradient of exactly zero", expected="a non-zero gradient", cure=cure)
    if other.abs().max() > 1e-6 * own.abs().max():
        got = f"a gradient of norm {other.norm():.3g} at the pixels of another video of the batch"
        cure = "compute each score from its own video: no batch statistics, no maximum or softmax over the batch"
        raise RewardError(name, got=got, expected="independence of batch neighbours", cure=cure)
    return own.norm().item()


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs() <= 1e-5 + 1e-4 * a.abs())


def _raise_unstable(name, call, video_BCTHW, prompts, score, swapped):
    """The same video scored differently: by chance (does the very same batch differ too?) or by its neighbour."""
    with torch.no_grad():
        repeated = call(video_BCTHW, prompts)[0]
    if not _close(score, repeated):
        got = f"two scores for the same batch, {score:.6g} and {repeated:.6g}"
        cure = "call .eval() on the model (dropout) and draw no random numbers inside"
        raise RewardError(name, got=got, expected="the same score each time", cure=cure)
    got = f"a score that moves from {score:.6g} to {swapped:.6g} when another sample of the batch changes"
    cure = "compute each score from its own video and prompt: no batch statistics, no maximum over the batch"
    raise RewardError(name, got=got, expected="independence of batch neighbours", cure=cure)
