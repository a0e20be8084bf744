"""Aesthetic predictors: linear heads on embeddings of CLIP (LAION v1, v2) or SigLIP (v2.5).

Sources: v1 LAION-AI/aesthetic-predictor; v2 christophschuhmann/improved-aesthetic-predictor, whose
`sac+logos+ava1-l14-linearMSE.pth` is also in trl-lib/ddpo-aesthetic-predictor; v2.5
discus0434/aesthetic-predictor-v2-5, siglip_v2_5.py.

Shape legend: N frames of all videos that are scored, C channels, H height, W width, P width of the
embedding.
"""

from collections.abc import Callable
from functools import partial

import torch

from rewards.common.base import FrameReward
from rewards.common.clip_models import (
    CLIP_L14,
    SIGLIP_384,
    Clip,
    ImageEncoder,
    Siglip,
    crop_as_openai,
    load_clip,
    load_siglip,
    random_clip,
    random_siglip,
)
from rewards.common.frames import require_choice
from rewards.common.heads import LinearLayers, load_head
from rewards.common.weights import hub_file
from rewards.contract import RewardError


class HeadScore(FrameReward):
    """A linear head on the unit embedding of a frame; the prompt is ignored.

    A subclass states how to build the head for an embedding width, the prefix of its keys in the
    published file, and that file's place on the hub, if it is there.
    """

    encoder: ImageEncoder
    build_head: Callable[[int], torch.nn.Module]
    head_prefix: str
    hub_head: tuple[str, str]

    def __init__(self, head: str | torch.nn.Module | None, **options):
        super().__init__(**options)
        if not isinstance(head, torch.nn.Module):
            path = head or hub_file(self.name, *self.hub_head, "head")
            head = load_head(self.name, path, self.head_prefix, self.build_head)
        self.head = head.to(torch.promote_types(self.dtype, torch.float32))

    def score_frames(self, frames_NCHW: torch.Tensor) -> torch.Tensor:
        """Return the head's scores (N,) of the embeddings of frames in [0, 1].

        Raises RewardError for embeddings of another width than the head's.
        """
        embeds_NP = self.encoder.embed(frames_NCHW)
        width = next(self.head.parameters()).shape[1]
        if embeds_NP.shape[1] != width:
            expected = f"embeddings of width {width}, as the head was trained on"
            cure = "choose the image model that belongs to the head"
            raise RewardError(self.name, got=f"width {embeds_NP.shape[1]}", expected=expected, cure=cure)
        return self.head(embeds_NP).squeeze(-1)


class Aesthetic(HeadScore):
    """The LAION aesthetic predictor v2: about 5 for an average photograph, 6.5 for a good one.

    The head has no activation between its layers: the score is w.e + 5.2 with |w| = 18, without a
    ceiling at 10. Training far beyond 7 finds pictures that exploit it.

    head     weights file (.safetensors or a state dict of torch), or a module; None: from the hub,
             3.7 MB
    model, backend, pretrained  the CLIP, as for clip_score; the published head needs CLIP L/14
    options  settings of FrameReward

    Raises RewardError for missing weights, and for a pickled module in place of a state dict.
    """

    name = "aesthetic"
    build_head, head_prefix = LinearLayers, "layers."
    hub_head = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"

    def __init__(
        self,
        head: str | torch.nn.Module | None = None,
        model: str | Clip = CLIP_L14,
        backend: str | None = None,
        pretrained: str | None = None,
        **options,
    ):
        super().__init__(head, **options)
        self.encoder = crop_as_openai(load_clip(self.name, model, backend, pretrained)).to(self.dtype)
        self.freeze()

    @classmethod
    def random_init(cls, **options) -> "Aesthetic":
        """Build the reward at full size with random weights on torch's default device."""
        return cls(cls.build_head(768), model=random_clip(CLIP_L14), **options)


class AestheticV1(Aesthetic):
    """The LAION aesthetic predictor v1, 10 times VBench's aesthetic quality.

    head           path of sa_0_4_vit_l_14_linear.pth, which is not on the hub, or a module
    preprocessing  "openai" (as of CLIP, with antialiasing) or "vbench_mp4" (VBench's, without)
    options        of Aesthetic, which raises the same errors
    """

    name = "aesthetic_v1"
    build_head, head_prefix = staticmethod(partial(torch.nn.Linear, out_features=1)), ""

    def __init__(self, head: str | torch.nn.Module, preprocessing: str = "openai", **options):
        fits = {"openai": None, "vbench_mp4": "mp4_shortest"}
        fit = require_choice(self.name, "preprocessing", preprocessing, fits)
        super().__init__(head, **options)
        self.encoder.fit = fit or self.encoder.fit


class AestheticV25(HeadScore):
    """The aesthetic predictor v2.5, about 1 to 10; at least 5.5 for a great picture.

    head     path of aesthetic_predictor_v2_5.pth, or a module; never downloaded, its licence is
             AGPL-3.0
    model    the SigLIP: hub id, folder, or a Siglip; only its vision tower is used
    options  settings of FrameReward; raises the same errors as Aesthetic
    """

    name = "aesthetic_v2_5"
    build_head = staticmethod(partial(LinearLayers, dropout_before_last=True))
    head_prefix = "scoring_head."

    def __init__(self, head: str | torch.nn.Module, model: str | Siglip = SIGLIP_384, **options):
        super().__init__(head, **options)
        self.encoder = load_siglip(self.name, model).to(self.dtype)
        self.freeze()

    @classmethod
    def random_init(cls, **options) -> "AestheticV25":
        """Build the reward at full size with random weights on torch's default device."""
        return cls(cls.build_head(1152), random_siglip(), **options)
