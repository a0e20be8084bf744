"""Networks that score nano videos: the verifier (a judge only) and the preference model (a reward).

They share no weights and no task. The verifier classifies attributes; the preference model ranks
clean, correctly captioned clips above degraded or miscaptioned ones. Shapes as in `rlhf.types`.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

from rlhf.nano import world

WORDS = (
    "<pad>",
    "<unknown>",
    *sorted(
        {w for s in world.SENTENCES for w in re.findall(r"(?<!{)\b[a-z]+\b(?!})", s)}
        | {w for p in world.MOTION_PHRASES.values() for w in " ".join(p).split()}
        | {"an", *world.COLORS, *world.SIZES, *world.GROUNDS, *world.COUNTS}
        | {*world.PLURALS, *world.PLURALS.values()}
    ),
)
MAX_WORDS = 16


def word_ids(prompts: list[str]) -> torch.Tensor:
    """Return ids of whole words, (B, MAX_WORDS) int64; 0 is padding, 1 any unknown word."""
    index = {w: i for i, w in enumerate(WORDS)}
    ids = torch.zeros(len(prompts), MAX_WORDS, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        words = [index.get(w, 1) for w in re.findall(r"[a-z]+", prompt.lower())][:MAX_WORDS]
        row[: len(words)] = torch.tensor(words, dtype=torch.long)
    return ids


class VideoTower(nn.Module):
    """Strided 3-D convolutions: video_BCTHW in [0, 1] -> features (B, 16 * width)."""

    def __init__(self, width: int = 32):
        super().__init__()
        stage = lambda inputs, outputs, stride: nn.Sequential(
            nn.Conv3d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU()
        )
        self.stages = nn.Sequential(
            stage(3, width, (1, 2, 2)),
            stage(width, 2 * width, (2, 2, 2)),
            stage(2 * width, 4 * width, (2, 2, 2)),
            stage(4 * width, 4 * width, (2, 2, 2)),
        )

    def forward(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """Return the features, (B, 16 * width)."""
        return F.adaptive_avg_pool3d(self.stages(video_BCTHW * 2 - 1), (1, 2, 2)).flatten(1)


class Verifier(nn.Module):
    """A classifier of colour, shape, motion and count of a clip; each may be none of these."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.tower = VideoTower(width)
        self.heads = nn.ModuleDict({k: nn.Linear(16 * width, world.NUM_VALUES[k] + 1) for k in world.JUDGED})

    def forward(self, video_BCTHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return logits of each attribute, (B, number of values + 1); the last is none of these."""
        features = self.tower(video_BCTHW)
        return {k: head(features) for k, head in self.heads.items()}


class Preference(nn.Module):
    """A model of how cleanly and correctly a clip shows its caption: a cosine of two embeddings."""

    def __init__(self, width: int = 32, dim: int = 128, layers: int = 2):
        super().__init__()
        self.tower = VideoTower(width)
        self.project = nn.Linear(16 * width, dim)
        self.words = nn.Embedding(len(WORDS), dim)
        self.positions = nn.Parameter(torch.randn(MAX_WORDS, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.log_scale = nn.Parameter(torch.tensor(2.5))  # temperature of training; the score does not use it

    def embed_video(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """Return unit embeddings (B, dim) of clips in [0, 1]."""
        return F.normalize(self.project(self.tower(video_BCTHW)), dim=-1)

    def embed_words(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """Return unit embeddings (B, dim) of `word_ids`, without the padding."""
        hidden = self.encoder(self.words(ids_BL) + self.positions)
        kept = (ids_BL > 0).unsqueeze(-1)
        return F.normalize((hidden * kept).sum(1) / kept.sum(1).clamp(min=1), dim=-1)

    def forward(self, video_BCTHW: torch.Tensor, ids_BL: torch.Tensor) -> torch.Tensor:
        """Return the cosines of clips and sentences, (B,) in [-1, 1]."""
        return (self.embed_video(video_BCTHW) * self.embed_words(ids_BL)).sum(-1)
