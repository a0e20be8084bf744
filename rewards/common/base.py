"""What rewards that look at frames share: their settings, chunks, precision, and the cache of prompts.

Shape legend: B batch, C channels, T frames, N frames of all videos that are scored, H height, W width.
"""

import inspect
from collections.abc import Callable

import torch

from rewards.common.frames import check_num_frames, check_positive, in_chunks, pick_frames
from rewards.common.weights import Frozen, torch_dtype
from rewards.contract import at_least_float32

CACHED_PROMPTS = 2000


def _joined(own: inspect.Signature, base: inspect.Signature) -> inspect.Signature:
    """`own` without self, and with the keyword arguments of `base` in place of **options."""
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


class ModelReward(Frozen):
    """The settings of a frozen model that looks at frames.

    frames      what must be decoded: "first", a number of leading frames, or "all"
    num_frames  which of these are scored: 4 evenly spaced, "random 4", "8 fps", or None for every one
    dtype       of the model; heads and scores are float32 in any case (float64 for a float64 model)
    chunk       frames in the model at once, recomputed in backward, to bound memory; the result stays the same
    mean, std   the typical score, for mixing

    A subclass calls super().__init__(**options), builds its model in `self.dtype`, and ends with `self.freeze()`.
    """

    name: str

    def __init__(
        self,
        *,
        frames: str | int = "first",
        num_frames: int | str | None = None,
        dtype: str = "float32",
        chunk: int | None = None,
        mean: float | None = None,
        std: float | None = None,
    ):
        super().__init__()
        check_num_frames(self.name, frames, num_frames)
        check_positive(self.name, chunk=chunk)
        self.frames, self.num_frames, self.chunk, self.mean, self.std = frames, num_frames, chunk, mean, std
        self.dtype = torch_dtype(self.name, dtype)

    def __init_subclass__(cls, **kwargs):
        """Show the options behind **options in the signature: to help(), and where misspelt names are looked up."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__signature__ = _joined(inspect.signature(cls.__init__), inspect.signature(cls.__base__))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class FrameReward(ModelReward):
    """The mean over frames of a score for each frame and its prompt; float32 whatever the model computes in.

    A subclass defines `score_frames` and, if it reads the prompt, `encode_text`.
    """

    def __init__(self, **options):
        super().__init__(**options)
        self._texts: dict[str, tuple[torch.Tensor, ...]] = {}

    def score_frames(self, frames_NCHW: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        """(N,) scores of frames in [0, 1], each with its own row of what `encode_text` gave."""
        raise NotImplementedError

    def encode_text(self, prompts: list[str]) -> tuple[torch.Tensor, ...]:
        """What score_frames needs of the prompts: tensors with one row for each, kept for later calls."""
        return ()

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        video_BTCHW = pick_frames(self, video_BCTHW, info).transpose(1, 2)
        batch, count = video_BTCHW.shape[:2]
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            text = [rows.repeat_interleave(count, 0) for rows in self.text_features(prompts)]
            scores_N = in_chunks(self.score_frames, self.chunk, video_BTCHW.flatten(0, 1), *text)
            return at_least_float32(scores_N).unflatten(0, (batch, count)).mean(1)

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> list[torch.Tensor]:
        """`encode_text` of the prompts; each is encoded once and then kept in host memory."""
        return [rows.to(self.device) for rows in encoded_once(self._texts, prompts, self.encode_text)]


def encoded_once(
    known: dict[str, tuple[torch.Tensor, ...]],
    prompts: list[str],
    encode: Callable[[list[str]], tuple[torch.Tensor, ...]],
) -> list[torch.Tensor]:
    """What encode(prompts) gives, on the CPU, asked only for prompts that are not `known`; the latest stay known.

    encode: prompts to tensors with a row for each. At most `CACHED_PROMPTS` are known afterwards.
    """
    new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    if new:
        features = [feature.cpu() for feature in encode(new)]
        known |= {prompt: tuple(feature[i] for feature in features) for i, prompt in enumerate(new)}
    columns = zip(*(known[prompt] for prompt in prompts), strict=True)
    stacked = [torch.stack(column) for column in columns]
    while len(known) > CACHED_PROMPTS:
        del known[next(iter(known))]
    return stacked
