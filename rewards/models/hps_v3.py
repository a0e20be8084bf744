"""HPSv3: human preference for an image and its prompt by Qwen2-VL-7B (arXiv 2508.03789).

Source: MizzenAI/HPSv3, hpsv3/inference.py and hpsv3/model/qwen2vl_trainer.py; MIT.

Shape legend: B batch, C channels, T frames, N frames of all videos that are scored, H height, W
width.
"""

import math
from pathlib import Path

import torch

from rewards.common.base import ModelReward
from rewards.common.frames import apply_in_chunks, pick_frames
from rewards.common.qwen_vl import QwenVl, load_qwen_vl, qwen2_vl_sizes, random_qwen_vl
from rewards.common.weights import load_published_weights, require_tensor, torch_dtype
from rewards.contract import RewardError

REPOSITORY, FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"
BASE = "Qwen/Qwen2-VL-7B-Instruct"
TOKENS = ["<|Reward|>"]
PIXELS = 256 * 28 * 28  # area of a resized image, as near as whole tokens allow

# The prompt template of training, verbatim: hpsv3/dataset/data_collator_qwen.py of MizzenAI/HPSv3
# (MIT): INSTRUCTION and prompt_with_special_token. Any change shifts the scores.
PROMPT = Path(__file__).with_name("prompts").joinpath("hps_v3.txt").read_text(encoding="utf-8")

# Sizes of Qwen2-VL-7B-Instruct as in its config.json, with the tokenizer's 151,657 tokens and the
# reward token.
SIZES = qwen2_vl_sizes(vocabulary=151658, width=3584, inner=18944, heads=28, key_value_heads=4)


class HpsV3(ModelReward):
    """Mean HPSv3 preference of frames, unbounded; published: SD 2 -0.2, SDXL 8.2, best 10.6.

    The model predicts the mean of the preference and the logarithm of its spread, as its training
    reads them (hpsv3/model/qwen2vl_trainer.py). The score is mean - uncertainty * spread.

    checkpoint  path of the published file; None: from the hub
    model       the base Qwen2-VL, for configuration and tokenizer: hub id or folder
    uncertainty number of spreads to subtract, so that doubtful videos score lower; 0: none
    options     settings of ModelReward; the default dtype is bfloat16

    Raises RewardError for weights that are missing, of another layout, or a pickled module.
    """

    name = "hps_v3"

    def __init__(
        self,
        checkpoint: str | QwenVl | None = None,
        model: str = BASE,
        dtype: str = "bfloat16",
        uncertainty: float = 0.0,
        **options,
    ):
        super().__init__(dtype=dtype, **options)
        if isinstance(uncertainty, bool) or not isinstance(uncertainty, int | float) or not 0 <= uncertainty < math.inf:
            cure = "give the number of spreads to subtract; YAML takes 1e-1 for text, but not 0.1"
            raise RewardError(
                self.name, got=f"uncertainty={uncertainty!r}", expected="a number of at least 0", cure=cure
            )
        self.uncertainty = uncertainty
        self.vlm = checkpoint if isinstance(checkpoint, QwenVl) else self._load(checkpoint, model)
        self.freeze()

    def _load(self, checkpoint: str | None, model: str) -> QwenVl:
        """Load base model and checkpoint; checkpoint None: the published file."""
        state = load_published_weights(self.name, checkpoint, REPOSITORY, FILE)
        width = require_tensor(self.name, state, "rm_head.0.weight").shape[1]
        return load_qwen_vl(self.name, model, state, preference_head(width), TOKENS, self.dtype)

    @classmethod
    def random_init(cls, dtype: str = "bfloat16", **settings) -> "HpsV3":
        """Build the reward at full size with random weights on torch's default device."""
        head = preference_head(SIZES["text_config"]["hidden_size"])
        vlm = random_qwen_vl(SIZES, head, TOKENS, torch_dtype(cls.name, dtype))
        return cls(vlm, dtype=dtype, **settings)

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        """Return the preference less `uncertainty` times its spread, (B,), mean over frames."""
        video_BCNHW = pick_frames(self, video_BCTHW, info)
        count = video_BCNHW.shape[2]
        texts = [PROMPT.format(text_prompt=prompt) for prompt in prompts]
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            images_NCTHW = video_BCNHW.transpose(1, 2).flatten(0, 1).unsqueeze(2)
            tokens = [rows.repeat_interleave(count, 0) for rows in self.vlm.tokens(self.name, texts)]
            logits_N12 = apply_in_chunks(self._logits, self.chunk, images_NCTHW, *tokens)
            mean_N, log_spread_N = logits_N12[:, 0].unbind(1)
            # Without uncertainty the spread is left alone: 0 times an infinite one is no number.
            scores_N = mean_N - self.uncertainty * log_spread_N.exp() if self.uncertainty else mean_N
            return scores_N.unflatten(0, (len(prompts), count)).mean(1)

    def _logits(self, images_NCTHW, ids_NL, where_NR) -> torch.Tensor:
        """Return (N, 1, 2): mean and log spread of the preference, read at the reward token."""
        return self.vlm(self.vlm.fit(images_NCTHW, PIXELS, PIXELS), ids_NL, where_NR)


def preference_head(width: int) -> torch.nn.Sequential:
    """Build the head width-1024-16-2 with ReLU; an identity replaces the dropout of training."""
    linear, relu = torch.nn.Linear, torch.nn.ReLU
    return torch.nn.Sequential(
        linear(width, 1024), relu(), torch.nn.Identity(), linear(1024, 16), relu(), linear(16, 2)
    )
