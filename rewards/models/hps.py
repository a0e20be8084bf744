"""HPS v2 and v2.1: human preference for an image given its prompt (arXiv 2306.09341).

A CLIP ViT-H/14 fine-tuned on human choices; the score is the cosine. The longer side of an image is
resized to 224 and the rest padded black, before normalising. The benchmark of the source multiplies
the score by 100. Source: tgxs002/HPSv2, hpsv2/img_score.py and hpsv2/src/open_clip/transform.py.
"""

from dataclasses import asdict
from functools import partial

import torch

from rewards.common.clip_models import Clip, OpenClip
from rewards.common.weights import build_from_state_dict, load_published_weights
from rewards.models.clip import CosineScore

REPOSITORY = "xswu/HPSv2"


class HpsV21(CosineScore):
    """Mean over frames of the cosine of frame and prompt; published images score about .14 to .31.

    checkpoint    path of the published file, or a Clip; None: from the hub
    architecture  open_clip name of the file's model
    options       settings of FrameReward

    Raises RewardError for weights that are missing, of another layout, or a pickled module.
    """

    name = "hps_v2_1"
    file = "HPS_v2.1_compressed.pt"

    def __init__(self, checkpoint: str | Clip | None = None, architecture: str = "ViT-H-14", **options):
        super().__init__(**options)
        clip = checkpoint if isinstance(checkpoint, Clip) else self._load(checkpoint, architecture)
        self.clip = clip.to(self.dtype)
        self.clip.fit = "pad"
        self.freeze()

    @classmethod
    def random_init(cls, **options) -> "HpsV21":
        """Build the reward at full size with random weights on torch's default device."""
        import open_clip

        return cls(OpenClip(random_open_clip(), open_clip.get_tokenizer("ViT-H-14")), **options)

    def _load(self, checkpoint: str | None, architecture: str) -> Clip:
        """Load the CLIP from a checkpoint; None: the published file."""
        import open_clip

        state = load_published_weights(self.name, checkpoint, REPOSITORY, self.file)
        source = checkpoint or self.file
        build = partial(random_open_clip, architecture)
        model = build_from_state_dict(self.name, source, build, state.get("state_dict", state))
        return OpenClip(model, open_clip.get_tokenizer(architecture))


class HpsV2(HpsV21):
    """HPS v2 with the settings of HpsV21. Its scores are not comparable with those of v2.1."""

    name = "hps_v2"
    file = "HPS_v2_compressed.pt"


def random_open_clip(architecture: str = "ViT-H-14") -> torch.nn.Module:
    """Build an open_clip model with random weights and its preprocessing settings."""
    import open_clip
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg

    config = open_clip.get_model_config(architecture)
    model = open_clip.CLIP(**config)
    set_model_preprocess_cfg(model, asdict(PreprocessCfg(size=config["vision_cfg"]["image_size"])))
    return model
