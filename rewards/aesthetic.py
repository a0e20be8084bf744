"""LAION's improved aesthetic predictor (v2): a linear head, in five layers, on unit CLIP L/14 image embeddings.

Source: christophschuhmann/improved-aesthetic-predictor, `sac+logos+ava1-l14-linearMSE.pth`; the same file is in the
repository trl-lib/ddpo-aesthetic-predictor.
"""

import torch

from rewards.base import RewardError
from rewards.clip import embed_frames
from rewards.clip_models import CLIP_L14, Clip, load_clip, random_clip
from rewards.frames import check_num_frames, pick_frames
from rewards.weights import Frozen, load_state_dict, missing_weights, quick_hub

HEAD_REPOSITORY, HEAD_FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"


class Aesthetic(Frozen):
    """Mean aesthetic score of the frames: about 5 for an average photograph, 6.5 and more for a good one.

    The head has no activation between its layers, so the score is w.e + 5.2 with |w| = 18: it has no ceiling at 10, and
    pushing it far beyond 7 finds pictures that exploit it.

    head        weights file (.safetensors or a state dict of torch); None: from the hub, 3.7 MB
    model, backend, pretrained, dtype  the CLIP, as for clip_score; the published head wants CLIP L/14
    frames, num_frames, chunk, mean, std  as for clip_score

    Raises RewardError for missing weights, and for a pickled module in place of a state dict.
    """

    name = "aesthetic"

    def __init__(
        self,
        head: "str | AestheticHead | None" = None,
        model: str | Clip = CLIP_L14,
        backend: str | None = None,
        pretrained: str | None = None,
        frames: str | int = "first",
        num_frames: int | str | None = None,
        dtype: str = "float32",
        chunk: int | None = None,
        mean: float | None = None,
        std: float | None = None,
    ):
        super().__init__()
        check_num_frames(self.name, frames, num_frames)
        made = isinstance(head, AestheticHead)
        self.head = head if made else load_head(self.name, head or _download_head(self.name))
        self.clip = load_clip(self.name, model, backend, pretrained, dtype)
        self.frames, self.num_frames, self.chunk, self.mean, self.std = frames, num_frames, chunk, mean, std
        self.freeze()

    @classmethod
    def random_init(cls, **settings) -> "Aesthetic":
        """Full size with random weights, on torch's default device, without hub or disk."""
        return cls(AestheticHead(), random_clip(CLIP_L14), **settings)

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            image_BNP = embed_frames(self.clip, pick_frames(self, video_BCTHW, info), self.chunk)
            return self.score_embeddings(image_BNP).mean(1)

    def score_embeddings(self, image_BNP: torch.Tensor) -> torch.Tensor:
        """(B, N) scores of unit embeddings."""
        if image_BNP.shape[-1] != self.head.width:
            expected = f"embeddings of width {self.head.width}, as the head was trained on (CLIP L/14: 768)"
            cure = "choose the CLIP model that belongs to the head"
            raise RewardError(self.name, got=f"width {image_BNP.shape[-1]}", expected=expected, cure=cure)
        return self.head(image_BNP).squeeze(-1)


class AestheticHead(torch.nn.Module):
    """width-1024-128-64-16-1, no activations. Identities stand where training had dropout, so that keys agree."""

    def __init__(self, width: int = 768):
        super().__init__()
        self.width = width
        linear, dropout = torch.nn.Linear, torch.nn.Identity
        first = [linear(width, 1024), dropout(), linear(1024, 128), dropout(), linear(128, 64), dropout()]
        self.layers = torch.nn.Sequential(*first, linear(64, 16), linear(16, 1))

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        return self.layers(embeds.to(self.layers[0].weight.dtype))


def load_head(name: str, path: str) -> AestheticHead:
    """The head in a state dict; its input width is the file's."""
    state = load_state_dict(name, path)
    width = state["layers.0.weight"].shape[1] if "layers.0.weight" in state else 768
    head = AestheticHead(width)
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        got = f"{path} with the keys {', '.join(sorted(state)[:4])}, ..."
        expected = "layers.{0,2,4,6,7}.{weight,bias} of width-1024-128-64-16-1"
        cure = "use the head of the improved predictor (v2)"
        raise RewardError(name, got=got, expected=expected, cure=cure) from error
    return head


def _download_head(name: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        with quick_hub():
            return hf_hub_download(HEAD_REPOSITORY, HEAD_FILE)
    except OSError as error:
        raise missing_weights(name, HEAD_REPOSITORY, "head", error) from error
