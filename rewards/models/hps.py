"""HPS v2 and v2.1: human preference for an image given its prompt (arXiv 2306.09341).

A CLIP ViT-H/14 fine-tuned on people's choices; the score is the plain cosine. Images keep their shape: the longer side
is scaled to 224 and black bars fill the rest, before normalising. Source: tgxs002/HPSv2, hpsv2/img_score.py and
hpsv2/src/open_clip/transform.py, whose benchmark gives 100 times this score.
"""

from dataclasses import asdict

import torch

from rewards.common.clip_models import Clip, OpenClip
from rewards.common.weights import filled, hub_file, load_state_dict
from rewards.models.clip import CosineScore

REPOSITORY = "xswu/HPSv2"


class HpsV21(CosineScore):
    """Mean over frames of the cosine between frame and prompt; published images score about .14 to .31.

    checkpoint    the published file on disk (weights, or these under "state_dict"), or a Clip; None: from the hub
    architecture  of the file, an open_clip name
    options       frames, num_frames, dtype, chunk, mean, std: as for FrameReward

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
        """Full size with random weights, on torch's default device, without hub or disk."""
        import open_clip

        return cls(OpenClip(untrained(), open_clip.get_tokenizer("ViT-H-14")), **options)

    def _load(self, checkpoint: str | None, architecture: str) -> Clip:
        import open_clip

        path = checkpoint or hub_file(self.name, REPOSITORY, self.file, "checkpoint")
        state = load_state_dict(self.name, path)
        model = filled(self.name, path, lambda: untrained(architecture), state.get("state_dict", state))
        return OpenClip(model, open_clip.get_tokenizer(architecture))


class HpsV2(HpsV21):
    """The first version of the weights; settings as for HpsV21. Its scores don't compare with those of v2.1."""

    name = "hps_v2"
    file = "HPS_v2_compressed.pt"


def untrained(architecture: str = "ViT-H-14") -> torch.nn.Module:
    """open_clip's model of that name with random weights, and its preprocessing (size, mean and std)."""
    import open_clip
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg

    config = open_clip.get_model_config(architecture)
    model = open_clip.CLIP(**config)
    set_model_preprocess_cfg(model, asdict(PreprocessCfg(size=config["vision_cfg"]["image_size"])))
    return model
