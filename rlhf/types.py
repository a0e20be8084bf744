"""Prompts and tensors that modules exchange: shapes, ranges and units, stated once.

Shape legend, used as suffixes of names: B batch, C channels, T frames (of video or of latents),
H height, W width, L text tokens, D text width, P pooled text width.

video_BCTHW    float32, RGB in [0, 1]
latents_BCTHW  float32, normalised to about unit variance (the transformer's input)
scores_B       float32, higher is better
sigma          0-d float32, noise level: 1 is pure noise, 0 is data
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True)
class Conditioning:
    """Text embeddings of a batch of prompts and, for guidance, of the negative prompt."""

    prompt_embeds_BLD: torch.Tensor
    pooled_embeds_BP: torch.Tensor
    negative_embeds_BLD: torch.Tensor | None = None
    negative_pooled_BP: torch.Tensor | None = None

    @property
    def negative(self) -> "Conditioning":
        """Return the negative prompt's embeddings, for the negative branch of guidance."""
        return Conditioning(self.negative_embeds_BLD, self.negative_pooled_BP)

    def to(self, *args: Any, **kwargs: Any) -> "Conditioning":
        """Move or cast every tensor, as `torch.Tensor.to` does."""
        values = (getattr(self, f.name) for f in fields(self))
        return Conditioning(*(None if v is None else v.to(*args, **kwargs) for v in values))


class _ClampStraightThrough(torch.autograd.Function):
    """A clamp whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx, x, low, high):
        """Clamp to [low, high]."""
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradient unchanged."""
        return grad, None, None


def clamp_straight_through(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Clamp x to [low, high] with the gradient of the identity: a saturated value has one."""
    return _ClampStraightThrough.apply(x, low, high)


class Prompt(str):
    """A prompt with the row that it was read from: {"prompt": the text, further fields}.

    row: values as JSON has them. read: names of the fields that something has read.
    """

    row: dict[str, Any]
    read: set[str]

    def __new__(cls, text: str, fields: dict[str, Any] | None = None) -> "Prompt":
        """Return the text with the fields of its row."""
        prompt = super().__new__(cls, text)
        prompt.row, prompt.read = (fields or {}) | {"prompt": str(text)}, set()
        return prompt


def reworded(prompt: str, text: str) -> Prompt:
    """Return another text for the row of a prompt."""
    new = Prompt(text)
    new.row, new.read = row_of(prompt), getattr(prompt, "read", new.read)
    return new


class Row(dict):
    """A copy of a prompt's row, which notes in `prompt.read` the fields that are read."""

    def __init__(self, prompt: str):
        super().__init__(copy.deepcopy(row_of(prompt)))
        self.read = getattr(prompt, "read", set())

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def __missing__(self, name: str) -> Any:
        raise KeyError(f"no field {name!r} in the row of the prompt, only {', '.join(map(str, super().keys()))}")

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field's value, or the default; the name counts as read."""
        self.read.add(name)
        return super().get(name, default)

    def __iter__(self) -> Iterator[str]:
        self.read.update(super().keys())
        return super().__iter__()

    def keys(self):
        """Return all names, which then count as read."""
        return dict.fromkeys(self).keys()

    def items(self):
        """Return all names with their values; all count as read."""
        return {name: self[name] for name in self}.items()


def row_of(prompt: str) -> dict[str, Any]:
    """Return the prompt's row; {"prompt": prompt} for a plain string."""
    return prompt.row if isinstance(prompt, Prompt) else {"prompt": prompt}


def fields_of(prompt: str) -> dict[str, Any]:
    """Return the further fields of the prompt's row, {} for none."""
    return {name: value for name, value in row_of(prompt).items() if name != "prompt"}


def negative_of(prompt: str, default: str) -> str:
    """Return the negative prompt of the prompt's row, or the default."""
    given = row_of(prompt).get("negative_prompt")
    return default if given is None else given


def rows_of(prompts: Iterable[str]) -> list[dict[str, Any]]:
    """Return a new row for each prompt, as rewards are given them."""
    return [Row(prompt) for prompt in prompts]
