"""The reward contract: any callable from videos and prompts to one score a video.

A reward is a plain callable; it needs to import nothing from here:

    def reward(video, prompts, **info):  # (B, C, T, H, W) float32 in [0, 1]; B strings
        return scores                    # (B,) float32, higher is better

`info` holds at least `fps` (frame rate of the video), `seed`, `step` and `rows`: for each prompt a
dict with "prompt" and the further fields of its row. All randomness derives from seed and step. For
a file whose frames are not 1 / fps apart, `info` also holds `times`, the seconds of each frame, and
`fps` is their mean rate. A reward without **info is given the keywords that its signature names.

A reward with `space = "latents"` gets latents in place of the video, at their noise level, and four
keywords more: see `NoisyLatents`. Nothing is decoded for it.

A reward with weights may also offer a classmethod `random_init(**settings)`. It returns the reward
at full size with random weights on torch's default device, without reading hub or disk. Benchmarks
and layout tests use it.

Shape legend: B batch, C channels, T frames (of video or of latents), H height, W width, L text
tokens, D text width, P pooled text width.
"""

import copy
import inspect
import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

import rlhf.types
from rewards.isolation import TimeLimitError, keep_process_state, time_limit
from rlhf.types import rows_of

# Optional attributes of a reward, with their defaults.
ATTRIBUTE_DEFAULTS = {
    "frames": "all",  # frames to decode: "first", a number of leading frames, or "all"
    "space": "pixels",  # input: "pixels", the decoded video, or "latents", as `NoisyLatents`
    "mean": None,  # typical score, used for mixing only if std is stated too
    "std": None,  # typical standard deviation of the score, > 0, for mixing
    "differentiable": True,  # False: for evaluation, and for training by scores alone
}
SPACES = ("pixels", "latents")


@dataclass(frozen=True)
class NoisyLatents:
    """Latents that rewards of space "latents" score, with the keywords that they get.

    latents_BCTHW: x = (1 - sigma) x0 + sigma noise, float32, (B, 16, F, H/8, W/8).
    sigma: their noise level in [0, 1]: 1 is pure noise, 0 a finished video. One for the batch.
    text_BLD, pooled_BP: embeddings of the prompts, as the generator's transformer is given them.
    """

    latents_BCTHW: torch.Tensor
    sigma: float
    text_BLD: torch.Tensor
    pooled_BP: torch.Tensor

    @property
    def info(self) -> dict[str, Any]:
        """Return the keywords of the reward: sigma, text (B, L, D) and pooled (B, P)."""
        return {"sigma": self.sigma, "text": self.text_BLD, "pooled": self.pooled_BP}


class Reward(Protocol):
    """The interface of a reward. Attributes are optional, see `ATTRIBUTE_DEFAULTS`.

    So are two methods. `check_prompts(prompts)`: a run calls it once, before the first step, with
    all prompts that the reward will be given. It raises an error for one that the reward cannot
    read. `check_generator(name, digest)`: a run calls it with the name of its generator and the
    `rlhf.generator.files.transformer_digest`. It raises an error for one whose latents the
    reward does not know.
    """

    frames: Literal["first", "all"] | int
    space: str
    mean: float | None
    std: float | None
    differentiable: bool

    def __call__(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        """Return scores (B,) float32, higher is better."""
        ...


class RewardError(ValueError):
    """A reward that breaks the contract or can't be loaded: name, got, expected, cure."""

    def __init__(self, name: str, *, got: str, expected: str, cure: str):
        """Compose the message; cure is a clause in the imperative."""
        self.name, self.got, self.expected, self.cure = name, got, expected, cure
        super().__init__(f"reward {name!r}: got {got}; expected {expected}. {cure[:1].upper()}{cure[1:]}.")


def reward_name(reward: str | Callable) -> str:
    """Return a reward's short name: of its spec, else its `name`, else of its function or class."""
    if isinstance(reward, str):
        return split_spec(reward)[0]
    return getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__


def split_spec(spec: str) -> tuple[str, str]:
    """Return the short name of a spec's reward, and the spec without a name given to it.

    "large=clip_score" is clip_score, named large. The name is otherwise that of the built-in, class
    or function, and "remote" for a server.
    """
    name, _, rest = spec.partition("=")
    if rest and name.replace("-", "_").isidentifier():
        return name, rest
    return "remote" if is_url(spec) else spec.rsplit(":", 1)[-1], spec


def is_url(spec: str) -> bool:
    """Return whether a spec names a reward server."""
    return spec.startswith(("http://", "https://"))


def reward_attribute(reward: Callable, attribute: str) -> Any:
    """Return a contract attribute or its default. Raises RewardError for an invalid value."""
    name, value = reward_name(reward), getattr(reward, attribute, ATTRIBUTE_DEFAULTS[attribute])
    if attribute == "frames":
        check_frames(name, value)
    if attribute == "space" and value not in SPACES:
        expected = "'pixels', the decoded video, or 'latents'"
        raise RewardError(name, got=f"space={value!r}", expected=expected, cure="correct the reward's space attribute")
    if attribute in ("mean", "std") and value is not None and not _is_statistic(value, positive=attribute == "std"):
        expected = "a number above 0, or None" if attribute == "std" else "a finite number, or None"
        cure = f"state the typical {'standard deviation' if attribute == 'std' else 'score'}, or drop mean and std"
        cure = "write it as a number; YAML takes 1e-2 for text, but not 0.01" if isinstance(value, str) else cure
        raise RewardError(name, got=f"{attribute}={value!r}", expected=expected, cure=cure)
    return value


def _is_statistic(value: Any, positive: bool) -> bool:
    """Return whether value is a finite number, above 0 if `positive`; text and bool are not."""
    try:
        number = math.nan if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError):
        return False
    return math.isfinite(number) and (number > 0 or not positive)


def call_reward(reward: Callable, video_BCTHW: torch.Tensor, prompts: list[str], info: dict) -> Any:
    """Return what the reward returns for videos and prompts, with `rows` added to its info."""
    function = reward.forward if isinstance(reward, torch.nn.Module) else reward
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of compiled functions
        parameters = []
    known = {parameter.name for parameter in parameters if parameter.kind != parameter.POSITIONAL_ONLY}
    info = {"rows": rows_of(prompts)} | info
    if parameters and not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        info = {name: value for name, value in info.items() if name in known}
    return reward(video_BCTHW, list(prompts), **info)


def check_prompts(name: str, reward: Callable, prompts: list[str]) -> None:
    """Call the reward's `check_prompts`, if it has one. Raises RewardError for a refused prompt."""
    with (
        keep_process_state(),
        name_reward_in_errors(name, "the run's prompts", "prompts that it can read", "correct the prompt"),
    ):
        getattr(reward, "check_prompts", list)(prompts)


def check_generator(name: str, reward: Callable, generator: str, digest: Callable[[], str]) -> None:
    """Call the reward's `check_generator`, if it has one. Raises RewardError for a refused one.

    generator: its name. digest: returns the digest of its transformer.
    """
    told = f"the generator {generator}", "latents that it knows", "train this generator with another reward"
    if hasattr(reward, "check_generator"):
        with keep_process_state(), name_reward_in_errors(name, *told):
            reward.check_generator(generator, digest())


def check_frames(name: str, frames: Any) -> None:
    """Raise RewardError unless `frames` is "first", "all" or an integer of at least 1."""
    is_count = isinstance(frames, int) and not isinstance(frames, bool) and frames >= 1
    if not is_count and frames not in ("first", "all"):
        expected = "'first', 'all' or a number of leading frames of at least 1"
        cure = "correct the reward's frames attribute"
        raise RewardError(name, got=f"frames={frames!r}", expected=expected, cure=cure)


def require_differentiable(name: str, reward: Callable) -> None:
    """Raise RewardError for a reward that says differentiable=False."""
    if not reward_attribute(reward, "differentiable"):
        cure = "train with --method nft, which needs no gradient, move it to eval_reward_funcs, or give it the weight 0"
        expected = "a reward with a gradient, for training"
        raise RewardError(name, got="differentiable=False", expected=expected, cure=cure)


def require_graph(name: str, scores_B: torch.Tensor) -> None:
    """Raise RewardError for scores in training that no gradient leads back from."""
    if not scores_B.requires_grad:
        got, expected = "scores without a gradient in this step", "a gradient in every step"
        cure = "look for a detach, a no_grad or a stored score that only some videos meet"
        raise RewardError(name, got=got, expected=expected, cure=f"{cure}; of a constant, return it + 0 * video.mean()")


def scores_latents(reward: Callable) -> bool:
    """Return whether the reward scores latents in place of the decoded video."""
    return reward_attribute(reward, "space") == "latents"


def refuse_latents(name: str, reward: Callable, cure: str) -> None:
    """Raise RewardError for a reward of latents where there are only decoded videos."""
    if scores_latents(reward):
        expected = "a reward of space 'pixels': there is a decoded video here, and no latents"
        raise RewardError(name, got="a reward of space 'latents'", expected=expected, cure=cure)


def frames_needed(reward: Callable, total: int) -> int:
    """Return how many leading frames to decode for the reward: 1 to total, or 0 for latents."""
    if scores_latents(reward):
        return 0
    frames = reward_attribute(reward, "frames")
    if frames == "all":
        return total
    return 1 if frames == "first" else min(frames, total)


def leading_info(info: dict, frames: int) -> dict:
    """Return `info` of the leading frames: their `times` and mean `fps`."""
    times = info.get("times")
    if times is None or frames >= len(times):
        return info
    return info | {"times": times[:frames], "fps": frames / (times[frames] - times[0])}


def check_scores(name: str, scores: Any, prompts: list[str], video_BCTHW: torch.Tensor | None = None) -> None:
    """Raise RewardError unless scores is a finite floating tensor of shape (B,), B = len(prompts).

    video_BCTHW, if given, distinguishes a broken reward from a video whose pixels are not finite
    already.
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


def call_guarded(
    name: str,
    reward: Callable,
    video_BCTHW: torch.Tensor,
    prompts: list[str],
    info: dict,
    given: str,
    expected: str,
    cure: str,
) -> Any:
    """Return what a reward returns for the frames that it needs, and let it change nothing else.

    The process keeps its state, prompts and info are copies. Raises RewardError, with `given`,
    `expected` and `cure`, for an exception, and for a video that the reward changed: found by its
    version counter and by a sample of its pixels.
    """
    frames = frames_needed(reward, video_BCTHW.shape[2]) or video_BCTHW.shape[2]  # latents are given whole
    before = _fingerprint(video_BCTHW)
    with keep_process_state(), name_reward_in_errors(name, given, expected, cure):
        told = leading_info(info, frames)
        tensors = {id(value): value.clone() for value in told.values() if isinstance(value, torch.Tensor)}
        scores = call_reward(reward, video_BCTHW[:, :, :frames], prompts, copy.deepcopy(told, tensors))
    after = _fingerprint(video_BCTHW)
    require_unchanged(name, before[0] == after[0] and torch.equal(before[1], after[1]))
    return scores


def require_unchanged(name: str, unchanged: bool) -> None:
    """Raise RewardError unless the video of a reward is as it was."""
    if not unchanged:
        got, cure = "a video that the reward changed in place", "begin with video = video.clone()"
        raise RewardError(name, got=got, expected="the video as it was, since others score it too", cure=cure)


def _fingerprint(video_BCTHW: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Return the version of a video and a copy of about 16 x 16 pixels of each frame.

    Inference tensors count no versions. NaN becomes a number, which is equal to itself.
    """
    version = 0 if video_BCTHW.is_inference() else video_BCTHW._version
    rows, columns = (max(1, side // 16) for side in video_BCTHW.shape[-2:])
    return version, video_BCTHW.detach()[..., ::rows, ::columns].nan_to_num()


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Cast half precision to float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def reward_time_limit(name: str, doing: str, seconds: float | None) -> Iterator[None]:
    """Raise RewardError if a reward's code runs longer than so many seconds; None: no limit.

    doing: what it does, for the message. `time_limit` says where there is none.
    """
    try:
        with time_limit(seconds):
            yield
    except TimeLimitError as error:
        got, cure = f"no end of {doing} after {seconds:g} s", "look for what it waits for, or raise reward_timeout"
        raise RewardError(name, got=got, expected="an end of it", cure=cure) from error


@contextmanager
def name_reward_in_errors(name: str, given: str, expected: str, cure: str) -> Iterator[None]:
    """Turn an exception into a RewardError with its text, input and deepest line of user code.

    So is SystemExit. RewardError and OutOfMemoryError, which have cures of their own, pass.
    """
    try:
        yield
    except (RewardError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)[2:]  # after this function and its caller
        ours = (__file__, rlhf.types.__file__)
        frames = [x for x in frames if "site-packages" not in x.filename and x.filename not in ours]
        places = [f" ({x.filename}, line {x.lineno})" for x in frames]
        got = f"{type(error).__name__}: {error}".rstrip(".") + f" for {given}" + "".join(places[-1:])
        raise RewardError(name, got=got, expected=expected, cure=cure) from error
