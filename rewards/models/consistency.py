"""VBench's subject and background consistency: similarity of frames over time (arXiv 2311.17982).

Each frame is compared with the previous and with the first. The score is the mean over frames 2 ..
N of half the sum of max(0, cosine to the previous) and max(0, cosine to the first). Source: VBench,
subject_consistency.py and background_consistency.py. A still video scores 1: combine with a reward
for motion.

Shape legend: B batch, C channels, T frames, N frames that are scored, H height, W width, P width of
the embedding.
"""

from functools import partial

import torch
import torch.nn.functional as F

from rewards.common.base import ModelReward
from rewards.common.clip_models import CLIP_B32, crop_as_openai, l2_normalize, load_clip, random_clip
from rewards.common.frames import apply_in_chunks, pick_frames, require_choice, require_frames
from rewards.common.preprocess import IMAGENET_MEAN, IMAGENET_STD, preprocess
from rewards.common.weights import Frozen, load_pretrained
from rewards.contract import at_least_float32

DINO = "facebook/dino-vitb16"


class Consistency(ModelReward):
    """The common part of both: scores in [0, 1], 1 for equal frames.

    model          image encoder: hub id or folder; None: the published one
    preprocessing  "vbench" (as it resizes folders of frames, with antialiasing) or "vbench_mp4" (as
                   it resizes mp4 files, without)
    options        settings of ModelReward; VBench scores all frames; at least 2
    """

    mp4_fit: str

    def __init__(
        self,
        model: str | Frozen | None = None,
        frames: str | int = "all",
        preprocessing: str = "vbench",
        **options,
    ):
        super().__init__(frames=frames, **options)
        fit = require_choice(self.name, "preprocessing", preprocessing, {"vbench": None, "vbench_mp4": self.mp4_fit})
        self.embedder = self.load_embedder(model).to(self.dtype)
        self.embedder.fit = fit or self.embedder.fit
        self.freeze()

    def load_embedder(self, model: str | Frozen | None) -> Frozen:
        """Load the image encoder, which has a method `embed`; None stands for the published one."""
        raise NotImplementedError

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        """Return `consistency` (B,) of the selected frames' embeddings, in at least float32."""
        video_BCNHW = pick_frames(self, video_BCTHW, info)
        require_frames(self.name, video_BCNHW.shape[2], 2)
        frames_NCHW = video_BCNHW.transpose(1, 2).flatten(0, 1)
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            embeds_NP = apply_in_chunks(self.embedder.embed, self.chunk, frames_NCHW)
            return consistency(embeds_NP.unflatten(0, (len(video_BCTHW), -1)))


def consistency(embeds_BNP: torch.Tensor) -> torch.Tensor:
    """Return VBench's consistency (B,) in [0, 1] of unit embeddings of at least 2 frames.

    Each later frame has the mean of its cosines with the previous and with the first frame, both
    at least 0.
    """
    later_BMP = embeds_BNP[:, 1:]  # M = N - 1
    previous_BM = (later_BMP * embeds_BNP[:, :-1]).sum(-1).clamp(min=0)
    first_BM = (later_BMP * embeds_BNP[:, :1]).sum(-1).clamp(min=0)
    return ((previous_BM + first_BM) / 2).mean(1)


class SubjectConsistency(Consistency):
    """Consistency of DINO ViT-B/16 embeddings (arXiv 2104.14294), which follow the main object."""

    name = "subject_consistency"
    mp4_fit = "mp4_whole"

    def load_embedder(self, model: str | Frozen | None) -> Frozen:
        """Load the image encoder; None: the published one."""
        if isinstance(model, Frozen):
            return model
        from transformers import ViTModel

        vit = load_pretrained(self.name, ViTModel, model or DINO, add_pooling_layer=False)
        return Dino(vit)

    @classmethod
    def random_init(cls, **settings) -> "SubjectConsistency":
        """Build the reward at full size with random weights on torch's default device."""
        from transformers import ViTConfig, ViTModel

        return cls(Dino(ViTModel(ViTConfig(), add_pooling_layer=False)), **settings)  # the config's defaults are DINO's


class BackgroundConsistency(Consistency):
    """Consistency of CLIP ViT-B/32 embeddings, which follow the scene; model as for ClipScore."""

    name = "background_consistency"
    mp4_fit = "mp4_shortest"

    def load_embedder(self, model: str | Frozen | None) -> Frozen:
        """Load the image encoder; None: the published one."""
        return crop_as_openai(load_clip(self.name, model or CLIP_B32))

    @classmethod
    def random_init(cls, **settings) -> "BackgroundConsistency":
        """Build the reward at full size with random weights on torch's default device."""
        return cls(random_clip(CLIP_B32), **settings)


class Dino(Frozen):
    """A transformers ViT with DINO's embedding of whole frames: the class token.

    Preprocessing follows VBench: shorter side to 224, bilinear, no crop, ImageNet's mean and std.
    """

    fit = "whole"

    def __init__(self, vit: torch.nn.Module):
        super().__init__()
        self.vit = vit
        vit.embeddings.interpolate_pos_encoding = partial(dino_positions, vit.embeddings)
        self.freeze()

    def embed(self, frames_NCHW: torch.Tensor) -> torch.Tensor:
        """Return unit embeddings (N, P) of frames in [0, 1]."""
        size = self.vit.config.image_size
        pixels_NCHW = preprocess(frames_NCHW, size, IMAGENET_MEAN, IMAGENET_STD, self.fit, "bilinear")
        pixels_NCHW = pixels_NCHW.to(next(self.parameters()).dtype)
        return l2_normalize(self.vit(pixels_NCHW, interpolate_pos_encoding=True).last_hidden_state[:, 0])


def dino_positions(embeddings: torch.nn.Module, tokens_NLD: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return position embeddings (1, L, D), interpolated as in DINO's vision_transformer.py.

    DINO adds 0.1 patch to each side and interpolates by scale factor; transformers interpolates to
    a size, which differs slightly.
    """
    table_1LD = embeddings.position_embeddings
    side = round((table_1LD.shape[1] - 1) ** 0.5)
    if tokens_NLD.shape[1] == table_1LD.shape[1] and height == width:
        return table_1LD
    grid_1Dhw = at_least_float32(table_1LD[:, 1:]).unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = tuple((pixels // embeddings.patch_size + 0.1) / side for pixels in (height, width))
    grid_1Dhw = F.interpolate(grid_1Dhw, scale_factor=scale, mode="bicubic")
    return torch.cat([table_1LD[:, :1], grid_1Dhw.flatten(2).transpose(1, 2).to(table_1LD)], dim=1)
