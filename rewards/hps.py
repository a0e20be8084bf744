"""HPS v2 and v2.1: human preference for an image given its prompt (arXiv 2306.09341).

A CLIP ViT-H/14 fine-tuned on people's choices; the score is the plain cosine. Images keep their shape: the longer side
is scaled to 224 and black bars fill the rest, before normalising.
"""

from pathlib import Path

from rewards.base import RewardError
from rewards.clip import ClipScore
from rewards.clip_models import Clip, load_clip, random_clip
from rewards.weights import missing_weights, quick_hub

REPOSITORY = "xswu/HPSv2"


class HpsV21(ClipScore):
    """Mean over frames of the cosine between frame and prompt; published images score about .14 to .31.

    checkpoint    the published file on disk; None: from the hub
    architecture  of the file, an open_clip name
    frames, num_frames, dtype, chunk, mean, std: as for ClipScore

    Raises RewardError for weights that are missing.
    """

    name = "hps_v2_1"
    file = "HPS_v2.1_compressed.pt"

    def __init__(self, checkpoint: str | Clip | None = None, architecture: str = "ViT-H-14", **clip_score):
        clip = checkpoint if isinstance(checkpoint, Clip) else self._load(checkpoint, architecture)
        clip.fit = "pad"
        super().__init__(model=clip, **clip_score)

    @classmethod
    def random_init(cls, **settings) -> "HpsV21":
        """Full size with random weights, on torch's default device, without hub or disk."""
        return cls(random_clip("ViT-H-14"), **settings)

    @classmethod
    def _load(cls, checkpoint: str | None, architecture: str) -> Clip:
        path = cls._published() if checkpoint is None else Path(checkpoint).expanduser()
        if not path.is_file():
            cure = "correct `checkpoint`, or leave it out to use the hub"
            raise RewardError(cls.name, got=f"no file at {path}", expected=cls.file, cure=cure)
        return load_clip(cls.name, architecture, backend="open_clip", pretrained=str(path))

    @classmethod
    def _published(cls) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            with quick_hub():
                return Path(hf_hub_download(REPOSITORY, cls.file))
        except Exception as error:  # offline, gated and broken connections all have types of their own
            raise missing_weights(cls.name, REPOSITORY, "checkpoint", error) from error


class HpsV2(HpsV21):
    """The first version of the weights; settings as for HpsV21."""

    name = "hps_v2"
    file = "HPS_v2_compressed.pt"
