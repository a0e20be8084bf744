"""LAION's aesthetic predictors v1 and v2 on CLIP, and v2.5 on SigLIP: linear heads on unit image embeddings.

Sources: v1 LAION-AI/aesthetic-predictor; v2 christophschuhmann/improved-aesthetic-predictor, whose
`sac+logos+ava1-l14-linearMSE.pth` is also in trl-lib/ddpo-aesthetic-predictor; v2.5
discus0434/aesthetic-predictor-v2-5, siglip_v2_5.py.

Shape legend: N frames of all videos that are scored, C channels, H height, W width, P width of the embedding.
"""

import torch

from rewards.base import RewardError
from rewards.clip_models import CLIP_L14, SIGLIP_384, Clip, ImageEncoder, Siglip, load_clip, load_siglip
from rewards.frame_reward import FrameReward
from rewards.heads import LinearLayers, load_head
from rewards.weights import hub_file, not_on_the_hub


class HeadScore(FrameReward):
    """A linear head on the unit embedding of a frame; the prompt is not read."""

    encoder: ImageEncoder
    head: torch.nn.Module

    def score_frames(self, frames_NCHW: torch.Tensor) -> torch.Tensor:
        embeds_NP = self.encoder.embed(frames_NCHW)
        width = next(self.head.parameters()).shape[1]
        if embeds_NP.shape[1] != width:
            expected = f"embeddings of width {width}, as the head was trained on"
            cure = "choose the image model that belongs to the head"
            raise RewardError(self.name, got=f"width {embeds_NP.shape[1]}", expected=expected, cure=cure)
        return self.head(embeds_NP).squeeze(-1)

    def finish(self, head: torch.nn.Module, encoder: ImageEncoder) -> None:
        self.head = head.to(torch.promote_types(self.dtype, torch.float32))
        self.encoder = encoder.to(self.dtype)
        self.freeze()


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
        super().__init__(**options)
        head = head if isinstance(head, torch.nn.Module) else self.load_head(head)
        self.finish(head, load_clip(self.name, model, backend, pretrained))

    def load_head(self, path: str | None) -> torch.nn.Module:
        path = path or hub_file(self.name, "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth", "head")
        return load_head(self.name, path, "layers.", LinearLayers)


class AestheticV1(Aesthetic):
    """Mean score of the frames by the first predictor, one linear layer; VBench's aesthetic quality is a tenth of it.

    `head` is the path of sa_0_4_vit_l_14_linear.pth; the other arguments are those of Aesthetic.
    """

    name = "aesthetic_v1"

    def load_head(self, path: str | None) -> torch.nn.Module:
        if path is None:
            raise not_on_the_hub(self.name, "LAION-AI/aesthetic-predictor", "sa_0_4_vit_l_14_linear.pth", "head")
        return load_head(self.name, path, "", lambda width: torch.nn.Linear(width, 1))


class AestheticV25(HeadScore):
    """Mean score of the frames by aesthetic predictor v2.5, in about 1 to 10; 5.5 and more is a great picture.

    head     path of aesthetic_predictor_v2_5.pth, or a module. Its licence is AGPL-3.0, so it is never downloaded for
             you
    model    the SigLIP: hub id, folder, or a Siglip; its image half is used
    options  as for Aesthetic; the same errors
    """

    name = "aesthetic_v2_5"

    def __init__(self, head: str | torch.nn.Module | None = None, model: str | Siglip = SIGLIP_384, **options):
        super().__init__(**options)
        head = head if isinstance(head, torch.nn.Module) else self.load_head(head)
        self.finish(head, load_siglip(self.name, model))

    def load_head(self, path: str | None) -> torch.nn.Module:
        repository = "discus0434/aesthetic-predictor-v2-5"
        if path is None:
            raise not_on_the_hub(self.name, repository, "models/aesthetic_predictor_v2_5.pth", "head")
        return load_head(self.name, path, "scoring_head.", lambda width: LinearLayers(width, dropout_before_last=True))
