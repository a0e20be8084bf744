"""V-JEPA 2: a world model's error in predicting the later frames (arXiv 2506.09985).

The score is minus the prediction error of the later frames' features (surprise, arXiv 2502.11831).
The loss is that of training: app/vjepa/train.py of facebookresearch/vjepa2 (MIT).

Shape legend: B batch, C channels, T frames, N frames that are scored, H height, W width, L tokens,
D feature width.
"""

from functools import partial

import torch
import torch.nn.functional as F

from rewards.common.base import FrozenReward
from rewards.common.checkpointing import recompute_in_backward
from rewards.common.frames import apply_in_chunks, check_positive, nearest_frames, require_frames
from rewards.common.preprocess import IMAGENET_MEAN, IMAGENET_STD, preprocess
from rewards.common.weights import load_pretrained
from rewards.contract import RewardError, at_least_float32

VJEPA2 = "facebook/vjepa2-vitl-fpc64-256"
RATE, MIN_FRAMES, MAX_FRAMES = 4.0, 4, 64  # frames a second, and of a clip, of the model's last training phase


class VJepa2(FrozenReward):
    """Minus the mean L1 distance of predicted and true features of the later frames; at most 0.

    As in training, early frames are encoded without the later ones, true features are normalised
    over their width, and the predictor uses mask token 0. `VJEPA2Model.forward` of transformers
    does not: it encodes all frames together, does not normalise, and uses the untrained token 1. A
    still video scores high: combine with a reward for motion.

    The model sees 4 frames per second from the first frame on: an even number, at most 64. Short
    videos are sampled faster, for at least 4 frames.

    model    hub id or folder of any V-JEPA 2
    context  share of the time that is visible, in (0, 1); the rest is predicted
    fps      frame rate of the videos if the call gives none
    options  settings of FrozenReward; chunk counts videos

    Raises RewardError for weights that are missing or incomplete.
    """

    name, frames = "vjepa2", "all"

    def __init__(
        self,
        model: "str | torch.nn.Module" = VJEPA2,
        context: float = 0.5,
        fps: float = 24.0,
        **options,
    ):
        super().__init__(**options)
        check_positive(self.name, fps=fps)
        if not 0 < context < 1:
            expected, cure = "a share of the time between 0 and 1", "correct context"
            raise RewardError(self.name, got=f"context={context}", expected=expected, cure=cure)
        if not isinstance(model, torch.nn.Module):
            from transformers import VJEPA2Model

            model = load_pretrained(self.name, VJEPA2Model, model)
        self.model = model.to(self.dtype)
        self.context, self.fps = context, fps
        recompute_in_backward([*self.model.encoder.layer, *self.model.predictor.layer])
        mask_tokens = self.model.predictor.embeddings
        mask_tokens.forward = partial(mask_tokens.forward, mask_index=0)  # training used only this one
        self.freeze()

    @classmethod
    def random_init(cls, **settings) -> "VJepa2":
        """Build the reward at full size with random weights on torch's default device."""
        from transformers import VJEPA2Config, VJEPA2Model

        return cls(VJEPA2Model(VJEPA2Config()), **settings)  # the configuration's defaults are those of ViT-L

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        """Return minus the `surprise` (B,) of frames at `RATE` a second, in at least float32."""
        require_frames(self.name, video_BCTHW.shape[2], MIN_FRAMES)
        chosen = clip_frames(video_BCTHW.shape[2], info.get("fps") or self.fps, info.get("times"))
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            return -apply_in_chunks(self.surprise, self.chunk, video_BCTHW[:, :, chosen])

    def surprise(self, video_BCNHW: torch.Tensor) -> torch.Tensor:
        """Return mean |prediction - truth| (B,) over tokens and features of the later frames."""
        config = self.model.config
        tubelets = video_BCNHW.shape[2] // config.tubelet_size
        shown = min(max(round(self.context * tubelets), 1), tubelets - 1)
        pixels_BNCHW = self.pixels(video_BCNHW)
        truth_BLD = self._encode(pixels_BNCHW)
        early_BLD = self._encode(pixels_BNCHW[:, : shown * config.tubelet_size])  # positions stay the same
        ids_BL = torch.arange(truth_BLD.shape[1], device=truth_BLD.device).expand(len(truth_BLD), -1)
        early, late = ids_BL[:, : early_BLD.shape[1]], ids_BL[:, early_BLD.shape[1] :]
        predicted_BLD = self.model.predictor(early_BLD, [early], [late]).last_hidden_state
        truth_BLD = at_least_float32(truth_BLD[:, early_BLD.shape[1] :])
        truth_BLD = F.layer_norm(truth_BLD, truth_BLD.shape[-1:])
        return (predicted_BLD - truth_BLD).abs().mean((1, 2))

    def _encode(self, pixels_BNCHW: torch.Tensor) -> torch.Tensor:
        """Return the encoder's features (B, L, D) of normalised pixels."""
        return self.model.encoder(pixel_values_videos=pixels_BNCHW).last_hidden_state

    def pixels(self, video_BCNHW: torch.Tensor) -> torch.Tensor:
        """Return pixels (B, N, C, crop, crop): short side at crop * 256/224, normalised."""
        crop = self.model.config.crop_size
        frames_NCHW, size = video_BCNHW.transpose(1, 2).flatten(0, 1), int(crop * 256 / 224)
        pixels_NCHW = preprocess(frames_NCHW, size, IMAGENET_MEAN, IMAGENET_STD, "whole", "bilinear")
        top, left = ((side - crop) // 2 for side in pixels_NCHW.shape[-2:])  # the offsets of transformers' processor
        return pixels_NCHW[..., top : top + crop, left : left + crop].unflatten(0, (len(video_BCNHW), -1))


def clip_frames(total: int, fps: float, times: list[float] | None = None) -> list[int]:
    """Return an even number of indices, about `RATE` per second; total >= 4.

    times, of frames that are not evenly spaced, in seconds: a frame that lasts may be repeated.
    """
    count = min(max(int(total / fps * RATE), MIN_FRAMES), MAX_FRAMES, total) // 2 * 2
    stride = min(max(fps / RATE, 1), (total - 1) / (count - 1))
    if times is not None:
        return nearest_frames((times[0] + i * stride / fps for i in range(count)), times)
    return [round(i * stride) for i in range(count)]
