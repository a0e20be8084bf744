"""VideoAlign (VideoReward): visual, motion and text quality of a video (arXiv 2501.13918).

A Qwen2-VL-2B with LoRA on its language model; a score is read at each of three tokens. Source:
KwaiVGI/VideoAlign, inference.py, trainer.py, vision_process.py and train.sh; MIT.

Shape legend: B batch, C channels, T frames, N frames that are scored, H height, W width.
"""

from pathlib import Path

import torch

from rewards.common.base import FrozenReward
from rewards.common.frames import apply_in_chunks, check_positive, nearest_frames, require_frames
from rewards.common.heads import dimension_weights
from rewards.common.qwen_vl import QwenVl, load_qwen_vl, merge_lora, qwen2_vl_sizes, random_qwen_vl
from rewards.common.weights import load_published_weights, require_tensor, torch_dtype

REPOSITORY, FILE = "KwaiVGI/VideoReward", "checkpoint-11352/model.pth"
BASE = "Qwen/Qwen2-VL-2B-Instruct"
LORA_ALPHA = 128  # the rank, 64, is read from the weights
RATE, MIN_FRAMES, MAX_FRAMES = 2.0, 4, 768  # frames a second that the model sees
MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 448 * 448  # of a frame

# Dimension -> its token, mean and standard deviation: inference_config of the published model.
DIMENSIONS = {
    "quality": ("<|VQ_reward|>", 3.6757, 2.2476),
    "motion": ("<|MQ_reward|>", 1.1646, 1.3811),
    "text": ("<|TA_reward|>", 2.8105, 2.5121),
}
TOKENS = [token for token, _, _ in DIMENSIONS.values()]

# The prompt template of training, verbatim: prompt_template.py of KwaiVGI/VideoAlign (MIT):
# DETAILED_PROMPT_WITH_SPECIAL_TOKEN. Any change shifts the scores.
PROMPT = Path(__file__).with_name("prompts").joinpath("video_align.txt").read_text(encoding="utf-8")

# Sizes of Qwen2-VL-2B-Instruct as in its config.json, with the tokenizer's 151,657 tokens and the
# three reward tokens.
SIZES = qwen2_vl_sizes(vocabulary=151660, width=1536, inner=8960, heads=12, key_value_heads=2)


class VideoAlign(FrozenReward):
    """A weighted sum of three quality scores of a video, each standardised on the authors' videos.

    The model sees 2 evenly spaced frames per second, first and last included, at least 4.

    dimension   "quality" (visual), "motion", "text" (alignment with the prompt), "overall" (their
                sum), or weights such as {motion: 2, text: 1}; all are computed in one pass
    checkpoint  path of the published file; None: from the hub
    model       the base Qwen2-VL, for configuration and tokenizer: hub id or folder
    fps         frame rate of the videos if the call gives none
    options     settings of FrozenReward; chunk counts videos; the default dtype is bfloat16

    Raises RewardError for weights that are missing, of another layout, or a pickled module.
    """

    name, frames = "video_align", "all"

    def __init__(
        self,
        dimension: str | dict[str, float] = "overall",
        checkpoint: str | QwenVl | None = None,
        model: str = BASE,
        fps: float = 24.0,
        dtype: str = "bfloat16",
        **options,
    ):
        super().__init__(dtype=dtype, **options)
        check_positive(self.name, fps=fps)
        self.weights = dimension_weights(self.name, dimension, list(DIMENSIONS), "overall", 1.0)
        self.vlm = checkpoint if isinstance(checkpoint, QwenVl) else self._load(checkpoint, model)
        self.fps = fps
        self.freeze()

    def _load(self, checkpoint: str | None, model: str) -> QwenVl:
        """Load base model and checkpoint, LoRA merged; checkpoint None: the published file."""
        state = merge_lora(load_published_weights(self.name, checkpoint, REPOSITORY, FILE), LORA_ALPHA, self.dtype)
        head = torch.nn.Linear(require_tensor(self.name, state, "rm_head.weight").shape[1], 1, bias=False)
        return load_qwen_vl(self.name, model, state, head, TOKENS, self.dtype)

    @classmethod
    def random_init(cls, dtype: str = "bfloat16", **settings) -> "VideoAlign":
        """Build the reward at full size with random weights on torch's default device."""
        head = torch.nn.Linear(SIZES["text_config"]["hidden_size"], 1, bias=False)
        vlm = random_qwen_vl(SIZES, head, TOKENS, torch_dtype(cls.name, dtype))
        return cls(checkpoint=vlm, dtype=dtype, **settings)

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        """Return the weighted sum (B,) of `dimensions`, in at least float32."""
        scores_B3 = self.dimensions(video_BCTHW, prompts, **info)
        return (scores_B3 * scores_B3.new_tensor(self.weights)).sum(1)

    def dimensions(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        """Return standardised scores (B, 3): quality, motion, text."""
        require_frames(self.name, video_BCTHW.shape[2], 2)
        chosen = frames_at_rate(video_BCTHW.shape[2], info.get("fps") or self.fps, info.get("times"))
        texts = [PROMPT.format(text_prompt=prompt) for prompt in prompts]
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            tokens = self.vlm.tokens(self.name, texts)
            logits_B31 = apply_in_chunks(self._logits, self.chunk, video_BCTHW[:, :, chosen], *tokens)
            mean_3, std_3 = logits_B31.new_tensor([figures for _, *figures in DIMENSIONS.values()]).T
            return (logits_B31[..., 0] - mean_3) / std_3

    def _logits(self, video_BCNHW, ids_BL, where_B3) -> torch.Tensor:
        """Return raw scores (B, 3, 1), read at the three reward tokens."""
        return self.vlm(self.vlm.fit(video_BCNHW, MIN_PIXELS, MAX_PIXELS), ids_BL, where_B3)


def frames_at_rate(total: int, fps: float, times: list[float] | None = None) -> list[int]:
    """Return an even number of indices, about `RATE` per second, first to last; total >= 2.

    times, of frames that are not evenly spaced, in seconds: a frame that lasts may be repeated.
    """
    count = min(max(total / fps * RATE, MIN_FRAMES), min(MAX_FRAMES, total) // 2 * 2)
    count = min(round(count / 2) * 2, total)
    if times is not None:
        return nearest_frames(torch.linspace(times[0], times[-1], count).tolist(), times)
    return torch.linspace(0, total - 1, count).round().long().tolist()
