"""V-JEPA 2: how well a world model foresees the end of a video from its beginning (arXiv 2506.09985).

The predictor guesses the features of the later frames from those of the earlier ones; what surprises it costs score.
Surprise by future prediction follows arXiv 2502.11831; the loss is that of the model's own training, app/vjepa/train.py
in facebookresearch/vjepa2 (MIT).

Shape legend: B batch, C channels, T frames, N frames that are scored, H height, W width, L tokens, D feature width.
"""

from functools import partial

import torch
import torch.nn.functional as F

from rewards.common.checkpointing import recompute_in_backward
from rewards.common.frames import check_positive, in_chunks, require_frames
from rewards.common.preprocess import IMAGENET_MEAN, IMAGENET_STD, resize_shorter
from rewards.common.weights import Frozen, load_pretrained, torch_dtype
from rewards.contract import RewardError, at_least_float32

VJEPA2 = "facebook/vjepa2-vitl-fpc64-256"
RATE, MIN_FRAMES, MAX_FRAMES = 4.0, 4, 64  # frames a second, and of a clip, of the model's last training phase


class VJepa2(Frozen):
    """Minus the mean L1 distance between predicted and true features of the later frames; at most 0.

    As in training, the early frames are encoded without sight of the later ones, the true features are normalised over
    their width, and the predictor fills in its mask token number 0. (`VJEPA2Model.forward` of transformers encodes the
    early frames together with the later ones, leaves out the normalisation and takes token 1, which is untrained.)
    A still video is easy to foresee: pair it with a reward for motion.

    The model sees 4 frames a second from the first frame on, an even number of them, at most 64; a short video is
    sampled faster, to have at least 4. The frame rate of the video is the caller's, reward(video, prompts, fps=24), or
    else the setting `fps`.

    model    the published repository, or a folder with its files; other sizes of V-JEPA 2 work too
    context  the share of the time that is shown; the rest is masked and foreseen. The mask is the same each time
    fps      frame rate of the videos where the caller doesn't state it
    dtype    of the model; scores are float32 in any case
    chunk    videos in the model at once, to bound memory; the result stays the same
    mean, std  the typical score, for mixing

    Raises RewardError for weights that are missing or incomplete.
    """

    name, frames = "vjepa2", "all"

    def __init__(
        self,
        model: "str | torch.nn.Module" = VJEPA2,
        context: float = 0.5,
        fps: float = 24.0,
        dtype: str = "float32",
        chunk: int | None = None,
        mean: float | None = None,
        std: float | None = None,
    ):
        super().__init__()
        check_positive(self.name, fps=fps, chunk=chunk)
        if not 0 < context < 1:
            expected, cure = "a share of the time between 0 and 1", "correct context"
            raise RewardError(self.name, got=f"context={context}", expected=expected, cure=cure)
        made = isinstance(model, torch.nn.Module)
        self.model = (model if made else self._load(model)).to(torch_dtype(self.name, dtype))
        self.context, self.fps, self.chunk, self.mean, self.std = context, fps, chunk, mean, std
        recompute_in_backward([*self.model.encoder.layer, *self.model.predictor.layer])
        fill_in = self.model.predictor.embeddings
        fill_in.forward = partial(fill_in.forward, mask_index=0)  # training with one clip length used that one only
        self.freeze()

    def _load(self, model: str) -> torch.nn.Module:
        from transformers import VJEPA2Model

        return load_pretrained(self.name, VJEPA2Model, model)

    @classmethod
    def random_init(cls, **settings) -> "VJepa2":
        """Full size with random weights, on torch's default device, without hub or disk."""
        from transformers import VJEPA2Config, VJEPA2Model

        return cls(VJEPA2Model(VJEPA2Config()), **settings)  # the configuration's defaults are those of ViT-L

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        require_frames(self.name, video_BCTHW.shape[2], MIN_FRAMES)
        chosen = clip_frames(video_BCTHW.shape[2], info.get("fps") or self.fps)
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            return -in_chunks(self.surprise, self.chunk, video_BCTHW[:, :, chosen])

    def surprise(self, video_BCNHW: torch.Tensor) -> torch.Tensor:
        """(B,) mean |prediction - truth| over the tokens and features of the later frames."""
        config = self.model.config
        tubelets = video_BCNHW.shape[2] // config.tubelet_size
        shown = min(max(round(self.context * tubelets), 1), tubelets - 1)
        pixels_BNCHW = self.pixels(video_BCNHW)
        truth_BLD = self._encode(pixels_BNCHW)
        early_BLD = self._encode(pixels_BNCHW[:, : shown * config.tubelet_size])  # leading places keep their positions
        ids_BL = torch.arange(truth_BLD.shape[1], device=truth_BLD.device).expand(len(truth_BLD), -1)
        early, late = ids_BL[:, : early_BLD.shape[1]], ids_BL[:, early_BLD.shape[1] :]
        predicted_BLD = self.model.predictor(early_BLD, [early], [late]).last_hidden_state
        truth_BLD = at_least_float32(truth_BLD[:, early_BLD.shape[1] :])
        truth_BLD = F.layer_norm(truth_BLD, truth_BLD.shape[-1:])
        return (predicted_BLD - truth_BLD).abs().mean((1, 2))

    def _encode(self, pixels_BNCHW: torch.Tensor) -> torch.Tensor:
        return self.model.encoder(pixel_values_videos=pixels_BNCHW).last_hidden_state

    def pixels(self, video_BCNHW: torch.Tensor) -> torch.Tensor:
        """(B, N, C, crop, crop), normalised: shorter side to 256/224 of the crop, bilinear, then the centre."""
        crop = self.model.config.crop_size
        frames_NCHW = resize_shorter(video_BCNHW.transpose(1, 2).flatten(0, 1), int(crop * 256 / 224), "bilinear")
        top, left = ((side - crop) // 2 for side in frames_NCHW.shape[-2:])  # as transformers' processor places it
        frames_NCHW = frames_NCHW[..., top : top + crop, left : left + crop]
        mean, std = (frames_NCHW.new_tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
        return ((frames_NCHW - mean) / std).unflatten(0, (len(video_BCNHW), -1))


def clip_frames(total: int, fps: float) -> list[int]:
    """Indices of an even number of frames, each once, `RATE` a second from the first on, within bounds; total >= 4."""
    count = min(max(int(total / fps * RATE), MIN_FRAMES), MAX_FRAMES, total) // 2 * 2
    apart = min(max(fps / RATE, 1), (total - 1) / (count - 1))
    return [round(i * apart) for i in range(count)]
