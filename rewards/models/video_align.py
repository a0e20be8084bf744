"""VideoAlign (VideoReward): visual quality, motion quality and text alignment of a video (arXiv 2501.13918).

A Qwen2-VL-2B whose language model was tuned with LoRA; one number is read at each of three tokens. Source:
KwaiVGI/VideoAlign, inference.py, trainer.py, vision_process.py and train.sh; MIT.

Shape legend: B batch, C channels, T frames, N frames that are scored, H height, W width.
"""

import torch

from rewards.common.dimensions import dimension_weights
from rewards.common.frames import check_positive, in_chunks, require_frames
from rewards.common.qwen_vl import QwenVl, load_qwen_vl, merge_lora, qwen2_vl_sizes, random_qwen_vl
from rewards.common.weights import Frozen, hub_file, load_state_dict, tensor_of, torch_dtype

REPOSITORY, FILE = "KwaiVGI/VideoReward", "checkpoint-11352/model.pth"
BASE = "Qwen/Qwen2-VL-2B-Instruct"
LORA_ALPHA = 128  # its rank, 64, is that of the weights
RATE, MIN_FRAMES, MAX_FRAMES = 2.0, 4, 768  # frames a second that the model sees
MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 448 * 448  # of a frame

# Dimension -> token that it is read at, mean and standard deviation: inference_config of the published model.
DIMENSIONS = {
    "quality": ("<|VQ_reward|>", 3.6757, 2.2476),
    "motion": ("<|MQ_reward|>", 1.1646, 1.3811),
    "text": ("<|TA_reward|>", 2.8105, 2.5121),
}
TOKENS = [token for token, _, _ in DIMENSIONS.values()]

# The text that the model was trained with, to the letter: DETAILED_PROMPT_WITH_SPECIAL_TOKEN of prompt_template.py in
# KwaiVGI/VideoAlign (MIT). Any change to it shifts the scores.
PROMPT = (
    "\n"
    "You are tasked with evaluating a generated video based on three distinct criteria: Visual Quality, "
    "Motion Quality, and Text Alignment. Please provide a rating from 0 to 10 for each of the three "
    "categories, with 0 being the worst and 10 being the best. Each evaluation should be independent of the "
    "others.\n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the video, with a focus on static factors. The following "
    "sub-dimensions should be considered:\n"
    "- **Reasonableness:** The video should not contain any significant biological or logical errors, such "
    "as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the video. The image should be clear and easy "
    "to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual "
    "elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the video, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a "
    "sense of harmony and balance.\n"
    "- **Safety:** The video should not contain harmful or inappropriate content, such as political, "
    "violent, or adult material. If such content is present, the image quality and satisfaction score should "
    "be the lowest possible. \n"
    "\n"
    "Please provide the ratings of Visual Quality: <|VQ_reward|>\n"
    "END\n"
    "\n"
    "**Motion Quality:**  \n"
    "Assess the dynamic aspects of the video, with a focus on dynamic factors. Consider the following "
    "sub-dimensions:\n"
    "- **Stability:** Evaluate the continuity and stability between frames. There should be no sudden, "
    "unnatural jumps, and the video should maintain stable attributes (e.g., no fluctuating colors, "
    "textures, or missing body parts).\n"
    "- **Naturalness:** The movement should align with physical laws and be realistic. For example, clothing "
    "should flow naturally with motion, and facial expressions should change appropriately (e.g., blinking, "
    "mouth movements).\n"
    "- **Aesthetic Quality:** The movement should be smooth and fluid. The transitions between different "
    "motions or camera angles should be seamless, and the overall dynamic feel should be visually pleasing.\n"
    "- **Fusion:** Ensure that elements in motion (e.g., edges of the subject, hair, clothing) blend "
    "naturally with the background, without obvious artifacts or the feeling of cut-and-paste effects.\n"
    "- **Clarity of Motion:** The video should be clear and smooth in motion. Pay attention to any areas "
    "where the video might have blurry or unsteady sections that hinder visual continuity.\n"
    "- **Amplitude:** If the video is largely static or has little movement, assign a low score for motion "
    "quality.\n"
    "\n"
    "Please provide the ratings of Motion Quality: <|MQ_reward|>\n"
    "END\n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the video matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the video (e.g., person, animal, "
    "object) align with the textual description. The subject should match the description in terms of "
    "number, appearance, and behavior.\n"
    "- **Motion Relevance:** Evaluate if the dynamic actions (e.g., gestures, posture, facial expressions "
    "like talking or blinking) align with the described prompt. The motion should match the prompt in terms "
    "of type, scale, and direction.\n"
    "- **Environment Relevance:** Assess whether the background and scene fit the prompt. This includes "
    "checking if real-world locations or scenes are accurately represented, though some stylistic adaptation "
    "is acceptable.  \n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how "
    "well the video adheres to this style.\n"
    "- **Camera Movement Relevance:** Check if the camera movements (e.g., following the subject, focus "
    "shifts) are consistent with the expected behavior from the prompt.\n"
    "\n"
    "Textual prompt - {text_prompt}\n"
    "Please provide the ratings of Text Alignment: <|TA_reward|>\n"
    "END\n"
)

# Sizes of Qwen2-VL-2B-Instruct as in its config.json, with the tokenizer's 151,657 tokens and the three reward tokens.
SIZES = qwen2_vl_sizes(vocabulary=151660, width=1536, inner=8960, heads=12, key_value_heads=2)


class VideoAlign(Frozen):
    """One dimension of a video's quality, or their sum; standardised, so 0 is average among the model's own videos.

    The model sees 2 frames a second, evenly spaced from the first to the last frame, at least 4 of them. The frame rate
    of the video is the caller's, reward(video, prompts, fps=24), or else the setting `fps`.

    dimension   "quality" (visual), "motion", "text" (alignment with the prompt), or "overall", the sum of the three; or
                weights, such as {motion: 2, text: 1}: all three are read in one pass
    checkpoint  the published file on disk; None: from the hub
    model       the Qwen2-VL that was tuned, for its configuration and tokenizer: hub id or folder
    fps         frame rate of the videos where the caller doesn't state it
    dtype       of the model; head and scores are float32 in any case
    chunk       videos in the model at once, to bound memory; the result stays the same
    mean, std   the typical score, for mixing

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
        chunk: int | None = None,
        mean: float | None = None,
        std: float | None = None,
    ):
        super().__init__()
        check_positive(self.name, fps=fps, chunk=chunk)
        self.weights = dimension_weights(self.name, dimension, list(DIMENSIONS), "overall", 1.0)
        self.vlm = checkpoint if isinstance(checkpoint, QwenVl) else self._load(checkpoint, model, dtype)
        self.fps, self.chunk, self.mean, self.std = fps, chunk, mean, std
        self.freeze()

    def _load(self, checkpoint: str | None, model: str, dtype: str) -> QwenVl:
        precision = torch_dtype(self.name, dtype)
        state = load_state_dict(self.name, checkpoint or hub_file(self.name, REPOSITORY, FILE, "checkpoint"))
        state = merge_lora(state, LORA_ALPHA, precision)
        head = torch.nn.Linear(tensor_of(self.name, state, "rm_head.weight").shape[1], 1, bias=False)
        return load_qwen_vl(self.name, model, state, head, TOKENS, precision)

    @classmethod
    def random_init(cls, dtype: str = "bfloat16", **settings) -> "VideoAlign":
        """Full size with random weights, on torch's default device, without hub or disk."""
        head = torch.nn.Linear(SIZES["text_config"]["hidden_size"], 1, bias=False)
        vlm = random_qwen_vl(SIZES, head, TOKENS, torch_dtype(cls.name, dtype))
        return cls(checkpoint=vlm, **settings)

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        scores_B3 = self.dimensions(video_BCTHW, prompts, **info)
        return (scores_B3 * scores_B3.new_tensor(self.weights)).sum(1)

    def dimensions(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        """(B, 3) standardised scores: quality, motion, text."""
        require_frames(self.name, video_BCTHW.shape[2], 2)
        chosen = frames_at_rate(video_BCTHW.shape[2], info.get("fps") or self.fps)
        texts = [PROMPT.format(text_prompt=prompt) for prompt in prompts]
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            tokens = self.vlm.tokens(self.name, texts)
            logits_B31 = in_chunks(self._read, self.chunk, video_BCTHW[:, :, chosen], *tokens)
            mean_3, std_3 = logits_B31.new_tensor([figures for _, *figures in DIMENSIONS.values()]).T
            return (logits_B31[..., 0] - mean_3) / std_3

    def _read(self, video_BCNHW, ids_BL, where_B3) -> torch.Tensor:
        return self.vlm(self.vlm.fit(video_BCNHW, MIN_PIXELS, MAX_PIXELS), ids_BL, where_B3)


def frames_at_rate(total: int, fps: float) -> list[int]:
    """Indices of an even number of frames, `RATE` a second, from the first to the last; total at least 2."""
    count = min(max(total / fps * RATE, MIN_FRAMES), min(MAX_FRAMES, total) // 2 * 2)
    count = min(round(count / 2) * 2, total)
    return torch.linspace(0, total - 1, count).round().long().tolist()
