"""PickScore: human choice between two images of one prompt (arXiv 2305.01569).

A CLIP ViT-H/14 fine-tuned on Pick-a-Pic. Source: yuvalkirstain/PickScore, README.md.
"""

import torch

from rewards.common.clip_models import CLIP_H14, Clip, random_clip
from rewards.models.clip import ClipScore


class PickScore(ClipScore):
    """Mean over frames of exp(logit_scale) * cosine of frame and prompt; about 18 to 24.

    A score difference d of two images is a log-odds: the first is picked with probability
    sigmoid(d).

    model    the published CLIPModel with its tokenizer: hub id, folder, or a Clip
    options  settings of ClipScore

    Raises RewardError for weights that are missing or incomplete.
    """

    name = "pickscore"

    def __init__(self, model: str | Clip = "yuvalkirstain/PickScore_v1", **options):
        super().__init__(model, **options)

    @classmethod
    def random_init(cls, **options) -> "PickScore":
        """Build the reward at full size with random weights on torch's default device."""
        return cls(random_clip(CLIP_H14), **options)

    def score_frames(self, frames_NCHW: torch.Tensor, text_NP: torch.Tensor) -> torch.Tensor:
        """Return scaled cosines (N,) of frames in [0, 1]."""
        return self.clip.scale * super().score_frames(frames_NCHW, text_NP)
