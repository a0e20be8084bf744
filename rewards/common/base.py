"""Base classes of rewards with a frozen model: settings, frames, chunks, prompt cache.

Shape legend: B batch, C channels, T frames, N scored frames of all videos, H height, W width.
"""

import inspect
from collections.abc import Callable

import torch

from rewards.common.frames import apply_in_chunks, check_num_frames, check_positive, pick_frames
from rewards.common.weights import Frozen, torch_dtype
from rewards.contract import at_least_float32

CACHED_PROMPTS = 2000


def _merge_signatures(own: inspect.Signature, base: inspect.Signature) -> inspect.Signature:
    """Return `own` without self and with the keyword arguments of `base` in place of **options."""
    parameters = list(own.parameters.values())[1:]
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        parameters.pop()
        named = {parameter.name for parameter in parameters}
        parameters += [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in base.parameters.values()
            if parameter.name not in named
        ]
    return own.replace(parameters=parameters)


class FrozenReward(Frozen):
    """A frozen reward model with the settings that all of them share.

    dtype      of the model: "float32", "bfloat16", "float16" or "float64"; scores are float32 at
               least
    chunk      videos (or frames) per forward pass, recomputed in backward; bounds memory, same
               scores
    mean, std  typical score and its standard deviation, for mixing

    A subclass calls super().__init__(**options), builds its model and ends with `self.freeze()`.
    """

    name: str

    def __init__(
        self,
        *,
        dtype: str = "float32",
        chunk: int | None = None,
        mean: float | None = None,
        std: float | None = None,
    ):
        """Store the settings. Raises RewardError for an unknown dtype and a chunk below 1."""
        super().__init__()
        check_positive(self.name, chunk=chunk)
        self.chunk, self.mean, self.std = chunk, mean, std
        self.dtype = torch_dtype(self.name, dtype)

    def __init_subclass__(cls, **kwargs):
        """Show inherited options in the signature, for help() and for hints on misspelt names."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__signature__ = _merge_signatures(inspect.signature(cls.__init__), inspect.signature(cls.__base__))


class ModelReward(FrozenReward):
    """A frozen reward model that scores chosen frames; further settings as for `FrozenReward`.

    frames      frames to decode: "first", a number of leading frames, or "all"
    num_frames  decoded frames to score: 4 evenly spaced, "random 4", "8 fps", or None for all
    """

    def __init__(self, *, frames: str | int = "first", num_frames: int | str | None = None, **options):
        """Store the settings. Raises RewardError for frames that can't be decoded or sampled."""
        super().__init__(**options)
        check_num_frames(self.name, frames, num_frames)
        self.frames, self.num_frames = frames, num_frames


class FrameReward(ModelReward):
    """The mean over frames of a score for each frame and its prompt.

    A subclass defines `score_frames` and, if it reads the prompt, `encode_text`.
    """

    def __init__(self, **options):
        """Store the settings and start an empty prompt cache."""
        super().__init__(**options)
        self._texts: dict[str, tuple[torch.Tensor, ...]] = {}

    def score_frames(self, frames_NCHW: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        """Return scores (N,) of frames in [0, 1]; text has a row per frame, from `encode_text`."""
        raise NotImplementedError

    def encode_text(self, prompts: list[str]) -> tuple[torch.Tensor, ...]:
        """Return tensors with one row per prompt, as input of `score_frames`; they are cached."""
        return ()

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        """Return the mean of `score_frames` (B,) over the selected frames, in at least float32."""
        video_BTCHW = pick_frames(self, video_BCTHW, info).transpose(1, 2)
        batch, count = video_BTCHW.shape[:2]
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            text = [rows.repeat_interleave(count, 0) for rows in self.text_features(prompts)]
            scores_N = apply_in_chunks(self.score_frames, self.chunk, video_BTCHW.flatten(0, 1), *text)
            return at_least_float32(scores_N).unflatten(0, (batch, count)).mean(1)

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> list[torch.Tensor]:
        """Return `encode_text` of the prompts from a cache in host memory."""
        return [rows.to(self.device) for rows in encode_with_cache(self._texts, prompts, self.encode_text)]


def encode_with_cache(
    cache: dict[str, tuple[torch.Tensor, ...]],
    prompts: list[str],
    encode: Callable[[list[str]], tuple[torch.Tensor, ...]],
) -> list[torch.Tensor]:
    """Return encode(prompts) on the CPU; only prompts that are not in the cache are encoded.

    encode maps prompts to tensors with one row each. The cache keeps the latest `CACHED_PROMPTS`
    prompts.
    """
    new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in cache]
    if new:
        features = [feature.cpu() for feature in encode(new)]
        cache |= {prompt: tuple(feature[i] for feature in features) for i, prompt in enumerate(new)}
    columns = zip(*(cache[prompt] for prompt in prompts), strict=True)
    stacked = [torch.stack(column) for column in columns]
    while len(cache) > CACHED_PROMPTS:
        del cache[next(iter(cache))]
    return stacked
