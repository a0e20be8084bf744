"""LAION's aesthetic predictors v1 and v2 on CLIP, and v2.5 on SigLIP: linear heads on unit image embeddings.

Sources: v1 LAION-AI/aesthetic-predictor; v2 christophschuhmann/improved-aesthetic-predictor, whose
`sac+logos+ava1-l14-linearMSE.pth` is also in trl-lib/ddpo-aesthetic-predictor; v2.5
discus0434/aesthetic-predictor-v2-5, siglip_v2_5.py.

Shape legend: N frames of all videos that are scored, C channels, H height, W width, P width of the embedding.
"""

import torch

from rewards.common.base import FrameReward
from rewards.common.clip_models import (
    CLIP_L14,
    SIGLIP_384,
    Clip,
    ImageEncoder,
    Siglip,
    load_clip,
    load_siglip,
    random_clip,
    random_siglip,
)
from rewards.common.heads import LinearLayers, load_head
from rewards.common.weights import hub_file
from rewards.contract import RewardError


class HeadScore(FrameReward):
    """A linear head on the unit embedding of a frame; the prompt is not read."""

    encoder: ImageEncoder

    def __init__(self, head: str | torch.nn.Module | None = None, **options):
        super().__init__(**options)
        head = head if isinstance(head, torch.nn.Module) else self.load_head(head)
        self.head = head.to(torch.promote_types(self.dtype, torch.float32))

    def load_head(self, path: str | None) -> torch.nn.Module:
        """The head of a weights file, float32; a subclass says where None comes from."""
        raise NotImplementedError

    def score_frames(self, frames_NCHW: torch.Tensor) -> torch.Tensor:
        """(N,) raw scores of frames in [0, 1]."""
        embeds_NP = self.encoder.embed(frames_NCHW)
        width = next(self.head.parameters()).shape[1]
        if embeds_NP.shape[1] != width:
            expected = f"embeddings of width {width}, as the head was trained on"
            cure = "choose the image model that belongs to the head"
            raise RewardError(self.name, got=f"width {embeds_NP.shape[1]}", expected=expected, cure=cure)
        return self.head(embeds_NP).squeeze(-1)


class Aesthetic(HeadScore):
    """Mean aesthetic score of the frames (v2): about 5 for an average photograph, 6.5 and more for a good one.

    The head has no activation between its layers, so the score is w.e + 5.2 with |w| = 18: it has no ceiling at 10, and
    pushing it far beyond 7 finds pictures that exploit it.

    head     weights file (.safetensors or a state dict of torch), or a module; None: from the hub, 3.7 MB
    model, backend, pretrained  the CLIP, as for clip_score; the published head wants CLIP L/14
    options  frames, num_frames, dtype, chunk, mean, std: as for FrameReward

    Raises RewardError for missing weights, and for a pickled module in place of a state dict.
    """

    name = "aesthetic"

    def __init__(
        self,
        head: str | torch.nn.Module | None = None,
        model: str | Clip = CLIP_L14,
        backend: str | None = None,
        pretrained: str | None = None,
        **options,
    ):
        super().__init__(head, **options)
        self.encoder = load_clip(self.name, model, backend, pretrained).to(self.dtype)
        self.freeze()

    def load_head(self, path: str | None) -> torch.nn.Module:
        path = path or hub_file(self.name, "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth", "head")
        return load_head(self.name, path, "layers.", LinearLayers)

    @classmethod
    def random_init(cls, **options) -> "Aesthetic":
        """Full size with random weights, on torch's default device, without hub or disk."""
        return cls(LinearLayers(768), random_clip(CLIP_L14), **options)


class AestheticV1(Aesthetic):
    """Mean score of the frames by the first predictor, one linear layer; VBench's aesthetic quality is a tenth of it.

    head     path of sa_0_4_vit_l_14_linear.pth, which is not on the hub, or a module
    options  as for Aesthetic, `model` among them; the same errors
    """

    name = "aesthetic_v1"

    def __init__(self, head: str | torch.nn.Module, **options):
        super().__init__(head, **options)

    def load_head(self, path: str) -> torch.nn.Module:
        return load_head(self.name, path, "", lambda width: torch.nn.Linear(width, 1))

    @classmethod
    def random_init(cls, **options) -> "AestheticV1":
        """As `Aesthetic.random_init`."""
        return cls(torch.nn.Linear(768, 1), model=random_clip(CLIP_L14), **options)


class AestheticV25(HeadScore):
    """Mean score of the frames by aesthetic predictor v2.5, in about 1 to 10; 5.5 and more is a great picture.

    head     path of aesthetic_predictor_v2_5.pth, or a module. Its licence is AGPL-3.0: it is never downloaded for you
    model    the SigLIP: hub id, folder, or a Siglip; its image half is used
    options  as for Aesthetic; the same errors
    """

    name = "aesthetic_v2_5"

    def __init__(self, head: str | torch.nn.Module, model: str | Siglip = SIGLIP_384, **options):
        super().__init__(head, **options)
        self.encoder = load_siglip(self.name, model).to(self.dtype)
        self.freeze()

    def load_head(self, path: str) -> torch.nn.Module:
        return load_head(self.name, path, "scoring_head.", lambda width: LinearLayers(width, dropout_before_last=True))

    @classmethod
    def random_init(cls, **options) -> "AestheticV25":
        """As `Aesthetic.random_init`."""
        return cls(LinearLayers(1152, dropout_before_last=True), random_siglip(), **options)
