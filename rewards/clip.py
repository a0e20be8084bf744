"""CLIP score: how well frames fit their prompt, by any CLIP of transformers or open_clip.

Shape legend: B batch, C channels, T frames, N frames that are scored, P width of the joint embedding.
"""

import torch

from rewards.clip_models import CLIP_L14, Clip, load_clip, random_clip, unit
from rewards.frames import check_num_frames, in_chunks, pick_frames
from rewards.weights import Frozen


class ClipScore(Frozen):
    """Mean over frames of the cosine between frame and prompt, in [-1, 1]; published models give about .2 to .38.

    model       a transformers CLIPModel (hub id or folder), an open_clip name such as "ViT-H-14" (then also
                `pretrained`), or a folder with open_clip_config.json, with or without "local-dir:" before it
    backend     "transformers" or "open_clip"; None: told from `model`
    pretrained  open_clip's tag or a weights file, for an open_clip name only
    frames      what must be decoded: "first", a number of leading frames, or "all"
    num_frames  which of these are scored: 4 evenly spaced, "random 4", "8 fps", or None for every one
    dtype       of the model; scores are float32 in any case
    chunk       frames in the model at once, to bound memory; the result stays the same
    mean, std   the typical score of this model, for mixing

    Raises RewardError for weights that are missing or incomplete.
    """

    name = "clip_score"

    def __init__(
        self,
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
        self.clip = load_clip(self.name, model, backend, pretrained, dtype)
        self.frames, self.num_frames, self.chunk, self.mean, self.std = frames, num_frames, chunk, mean, std
        self._text_cache: dict[str, torch.Tensor] = {}
        self.freeze()

    @classmethod
    def random_init(cls, model: str = CLIP_L14, **settings) -> "ClipScore":
        """Full size with random weights, on torch's default device, without hub or disk; `model` as for random_clip."""
        return cls(random_clip(model), **settings)

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            image_BNP = embed_frames(self.clip, pick_frames(self, video_BCTHW, info), self.chunk)
            text_B1P = self.text_features(prompts).to(image_BNP)[:, None]
        return (image_BNP * text_B1P).sum(-1).mean(1)

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> torch.Tensor:
        """(B, P) unit embeddings; each prompt is embedded once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text_cache]
        if new:
            self._text_cache.update(zip(new, unit(self.clip.encode_text(new)), strict=True))
        return torch.stack([self._text_cache[prompt].to(self.clip.device) for prompt in prompts])


def embed_frames(clip: Frozen, video_BCNHW: torch.Tensor, chunk: int | None) -> torch.Tensor:
    """(B, N, P) unit float32 embeddings of all N frames, recomputed chunk by chunk in backward."""
    frames_NCHW = video_BCNHW.transpose(1, 2).flatten(0, 1)
    return in_chunks(clip.embed, chunk, frames_NCHW).unflatten(0, (video_BCNHW.shape[0], -1))
