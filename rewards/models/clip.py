"""CLIP score: similarity of frames and prompt by any CLIP (arXiv 2104.08718).

Shape legend: N frames of all videos that are scored, C channels, H height, W width, P width of the
joint embedding.
"""

import torch

from rewards.common.base import FrameReward
from rewards.common.clip_models import CLIP_L14, Clip, l2_normalize, load_clip, random_clip


class CosineScore(FrameReward):
    """The cosine of frame and prompt by `self.clip`."""

    clip: Clip

    def encode_text(self, prompts: list[str]) -> tuple[torch.Tensor]:
        """Return unit embeddings ((N, P),) of the prompts."""
        return (l2_normalize(self.clip.encode_text(prompts)),)

    def score_frames(self, frames_NCHW: torch.Tensor, text_NP: torch.Tensor) -> torch.Tensor:
        """Return cosines (N,) of frames in [0, 1]."""
        return (self.clip.embed(frames_NCHW) * text_NP).sum(-1)


class ClipScore(CosineScore):
    """Mean over frames of the cosine of frame and prompt, in [-1, 1]; usually .2 to .38.

    model       a transformers CLIPModel (hub id or folder), an open_clip name such as "ViT-H-14"
                (with `pretrained`), a folder with open_clip_config.json, or a Clip
    backend     "transformers" or "open_clip"; None: guessed from `model`
    pretrained  tag of open_clip or a weights file, for an open_clip name only
    options     settings of FrameReward

    Raises RewardError for weights that are missing or incomplete.
    """

    name = "clip_score"

    def __init__(
        self, model: str | Clip = CLIP_L14, backend: str | None = None, pretrained: str | None = None, **options
    ):
        super().__init__(**options)
        self.clip = load_clip(self.name, model, backend, pretrained).to(self.dtype)
        self.freeze()

    @classmethod
    def random_init(cls, model: str = CLIP_L14, **options) -> "ClipScore":
        """Build the reward at full size with random weights on torch's default device."""
        return cls(random_clip(model), **options)
