"""A soft version of VBench's dynamic degree (arXiv 2311.17982) on RAFT's flow (arXiv 2003.12039).

Shape legend: B batch, C channels, T frames, N frames that are scored, M pairs of frames, H height,
W width.
"""

import torch
from torchvision.models.optical_flow import RAFT, raft, raft_large

from rewards.common.frames import apply_in_chunks, check_num_frames, check_positive, pick_frames, require_frames
from rewards.common.preprocess import resize
from rewards.common.weights import Frozen, load_from_torch_hub, load_state_dict
from rewards.contract import RewardError, at_least_float32

URL = "https://download.pytorch.org/models/raft_large_C_T_SKHT_V2-ff5fadd5.pth"
FASTEST, THRESHOLD = 0.05, 6 / 256  # share of the pixels that count; movement per frame / shorter side


class MotionDegree(Frozen):
    """Soft share of adjacent frames with motion, in (0, 1); near 0 for a still video.

    A pair of frames scores sigmoid((m - 6 min(H, W) / 256) / temperature), where m is the mean
    length, in pixels, of the longest 5 % of the flow. VBench scores 1 if m is above the threshold,
    on every round(fps / 8)-th frame, as here.

    weights            path of torchvision's raft_large C_T_SKHT_V2; None: torch's cache, or a
                       download of 20 MB
    size               shorter side for the flow model in pixels, a multiple of 8
    temperature        pixels; a larger one gives nearly still videos more gradient
    num_flow_updates   iterations of RAFT's recurrent unit
    frames, num_frames as for ModelReward; the default needs `fps` in info
    chunk              pairs of frames per forward pass; bounds memory, same scores
    mean, std          typical score and its standard deviation, for mixing
    """

    name = "motion_degree"

    def __init__(
        self,
        weights: str | RAFT | None = None,
        size: int = 256,
        temperature: float = 1.0,
        num_flow_updates: int = 12,
        frames: str | int = "all",
        num_frames: int | str | None = "every 8 fps",
        chunk: int | None = None,
        mean: float | None = None,
        std: float | None = None,
    ):
        super().__init__()
        check_num_frames(self.name, frames, num_frames)
        check_positive(self.name, temperature=temperature, num_flow_updates=num_flow_updates, chunk=chunk)
        self.raft = weights if isinstance(weights, RAFT) else load_raft(self.name, weights)
        least = 16 * 2 ** (self.raft.corr_block.num_levels - 1)  # the coarsest correlation needs more than one number
        if size < least or size % 8:
            cure = "choose such a size; 256 to 320 is usual"
            raise RewardError(self.name, got=f"size={size}", expected=f"a multiple of 8, at least {least}", cure=cure)
        self.size, self.temperature, self.num_flow_updates = size, temperature, num_flow_updates
        self.frames, self.num_frames, self.chunk, self.mean, self.std = frames, num_frames, chunk, mean, std
        self.freeze()

    @classmethod
    def random_init(cls, **settings) -> "MotionDegree":
        """Build the reward at full size with random weights on torch's default device."""
        return cls(raft_large(), **settings)

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        """Return the mean of `motion` (B,) over pairs of adjacent selected frames."""
        video_BCNHW = pick_frames(self, video_BCTHW, info)
        require_frames(self.name, video_BCNHW.shape[2], 2)
        frames_BNCHW = video_BCNHW.transpose(1, 2)
        before_MCHW, after_MCHW = frames_BNCHW[:, :-1].flatten(0, 1), frames_BNCHW[:, 1:].flatten(0, 1)
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            motion_M = apply_in_chunks(self.motion, self.chunk, before_MCHW, after_MCHW)
        return motion_M.unflatten(0, (video_BCTHW.shape[0], -1)).mean(1)

    def motion(self, before_MCHW: torch.Tensor, after_MCHW: torch.Tensor) -> torch.Tensor:
        """Return soft motion scores (M,) in (0, 1) of pairs of frames in [0, 1]."""
        before_MCHW, after_MCHW = (flow_pixels(frames, self.size) for frames in (before_MCHW, after_MCHW))
        flow_M2HW = optical_flow(self.raft, before_MCHW, after_MCHW, self.num_flow_updates)
        threshold = THRESHOLD * min(flow_M2HW.shape[-2:])
        return torch.sigmoid((longest_flow(flow_M2HW) - threshold) / self.temperature)


def flow_pixels(frames_NCHW: torch.Tensor, size: int) -> torch.Tensor:
    """Return RAFT's input in [-1, 1]: shorter side `size`, longer a multiple of 8."""
    shorter = min(frames_NCHW.shape[-2:])
    height, width = (8 * round(side * size / shorter / 8) for side in frames_NCHW.shape[-2:])
    return 2 * resize(at_least_float32(frames_NCHW), height, width) - 1


def longest_flow(flow_M2HW: torch.Tensor) -> torch.Tensor:
    """Return the mean length (M,), in pixels, of the longest 5 % of the flow."""
    length_ML = (flow_M2HW.square().sum(1) + 1e-12).sqrt().flatten(1)  # no gradient of sqrt at 0
    return length_ML.topk(max(1, int(FASTEST * length_ML.shape[1]))).values.mean(1)


def optical_flow(
    model: RAFT, before_MCHW: torch.Tensor, after_MCHW: torch.Tensor, num_flow_updates: int
) -> torch.Tensor:
    """Return torchvision's RAFT flow (M, 2, H, W) in pixels with its full gradient.

    torchvision detaches the start of each update, as in training. Its pixel gradient is therefore
    not that of its output.
    """
    correlation, hidden_size = model.corr_block, model.update_block.hidden_state_size
    correlation.build_pyramid(*model.feature_encoder(torch.cat([before_MCHW, after_MCHW])).chunk(2))
    encoded_MChw = model.context_encoder(before_MCHW)
    hidden, context = encoded_MChw[:, :hidden_size].tanh(), encoded_MChw[:, hidden_size:].relu()
    start_M2hw = raft.make_coords_grid(len(hidden), *hidden.shape[-2:], device=hidden.device).to(hidden.dtype)
    place_M2hw = start_M2hw
    for _ in range(num_flow_updates):
        seen = correlation.index_pyramid(centroids_coords=place_M2hw)
        hidden, step_M2hw = model.update_block(hidden, context, seen, place_M2hw - start_M2hw)
        place_M2hw = place_M2hw + step_M2hw
    correlation.corr_pyramid = []  # else it keeps the graph
    return raft.upsample_flow(place_M2hw - start_M2hw, model.mask_predictor(hidden))


def load_raft(name: str, path: str | None) -> RAFT:
    """Load raft_large from `path`, torch's cache or torchvision's server. Raises RewardError."""
    model = raft_large()
    state = load_from_torch_hub(name, URL, "weights") if path is None else load_state_dict(name, path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        got = f"{path or URL} with the keys {', '.join(sorted(state)[:3])}, ..."
        cure = "use a raft_large file of torchvision; princeton-vl's own names differ"
        raise RewardError(name, got=got, expected="the state dict of torchvision's raft_large", cure=cure) from error
    return model
