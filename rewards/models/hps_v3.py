"""HPSv3: human preference for an image given its prompt, by a tuned Qwen2-VL-7B (arXiv 2508.03789).

Source: MizzenAI/HPSv3, hpsv3/inference.py and hpsv3/model/qwen2vl_trainer.py; MIT.

Shape legend: B batch, C channels, T frames, N frames of all videos that are scored, H height, W width.
"""

import torch

from rewards.common.base import ModelReward
from rewards.common.frames import in_chunks, pick_frames
from rewards.common.qwen_vl import QwenVl, load_qwen_vl, qwen2_vl_sizes, random_qwen_vl
from rewards.common.weights import hub_file, load_state_dict, tensor_of, torch_dtype

REPOSITORY, FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"
BASE = "Qwen/Qwen2-VL-7B-Instruct"
TOKENS = ["<|Reward|>"]
PIXELS = 256 * 28 * 28  # what each image is resized to, up or down, as near as whole tokens allow

# The text that the model was trained with, to the letter: hpsv3/dataset/data_collator_qwen.py of MizzenAI/HPSv3 (MIT),
# INSTRUCTION and prompt_with_special_token. Any change to it shifts the scores.
PROMPT = (
    "\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a "
    "overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the "
    "worst and 10 being the best. \n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such "
    "as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy "
    "to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual "
    "elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a "
    "sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, "
    "violent, or adult material. If such content is present, the image quality and satisfaction score should "
    "be the lowest possible. \n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, "
    "object) align with the textual description. The subject should match the description in terms of "
    "number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how "
    "well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the "
    "image logically fit the scenario described in the prompt. The environment should support and enhance "
    "the subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be "
    "acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in "
    "the image. The generated content should not introduce elements that conflict with or distort the "
    "original description.\n"
    "Textual prompt - {text_prompt}\n"
    "\n"
    "\n"
    "\n"
    "Please provide the overall ratings of this image: <|Reward|>\n"
    "\n"
    "END\n"
)

# Sizes of Qwen2-VL-7B-Instruct as in its config.json, with the tokenizer's 151,657 tokens and the reward token.
SIZES = qwen2_vl_sizes(vocabulary=151658, width=3584, inner=18944, heads=28, key_value_heads=4)


class HpsV3(ModelReward):
    """Mean over frames of the preference that HPSv3 gives a frame; published: SD 2 -0.2, SDXL 8.2, the best 10.6.

    The model states a mean and a spread; the score is the mean, as published. It has no upper bound.

    checkpoint  the published file on disk; None: from the hub
    model       the Qwen2-VL that was tuned, for its configuration and tokenizer: hub id or folder
    options     frames, num_frames, dtype, chunk, mean, std: as for ModelReward, but for dtype, which is bfloat16 here

    Raises RewardError for weights that are missing, of another layout, or a pickled module.
    """

    name = "hps_v3"

    def __init__(
        self,
        checkpoint: str | QwenVl | None = None,
        model: str = BASE,
        dtype: str = "bfloat16",
        **options,
    ):
        super().__init__(dtype=dtype, **options)
        self.vlm = checkpoint if isinstance(checkpoint, QwenVl) else self._load(checkpoint, model)
        self.freeze()

    def _load(self, checkpoint: str | None, model: str) -> QwenVl:
        state = load_state_dict(self.name, checkpoint or hub_file(self.name, REPOSITORY, FILE, "checkpoint"))
        width = tensor_of(self.name, state, "rm_head.0.weight").shape[1]
        return load_qwen_vl(self.name, model, state, preference_head(width), TOKENS, self.dtype)

    @classmethod
    def random_init(cls, dtype: str = "bfloat16", **settings) -> "HpsV3":
        """Full size with random weights, on torch's default device, without hub or disk."""
        head = preference_head(SIZES["text_config"]["hidden_size"])
        vlm = random_qwen_vl(SIZES, head, TOKENS, torch_dtype(cls.name, dtype))
        return cls(vlm, dtype=dtype, **settings)

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        video_BCNHW = pick_frames(self, video_BCTHW, info)
        count = video_BCNHW.shape[2]
        texts = [PROMPT.format(text_prompt=prompt) for prompt in prompts]
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            images_NCTHW = video_BCNHW.transpose(1, 2).flatten(0, 1).unsqueeze(2)
            tokens = [rows.repeat_interleave(count, 0) for rows in self.vlm.tokens(self.name, texts)]
            logits_N12 = in_chunks(self._read, self.chunk, images_NCTHW, *tokens)
            return logits_N12[:, 0, 0].unflatten(0, (len(prompts), count)).mean(1)

    def _read(self, images_NCTHW, ids_NL, where_NR) -> torch.Tensor:
        return self.vlm(self.vlm.fit(images_NCTHW, PIXELS, PIXELS), ids_NL, where_NR)


def preference_head(width: int) -> torch.nn.Sequential:
    """width-1024-16-2 with ReLU: mean and spread of the preference. The identity stands where training had dropout."""
    linear, relu = torch.nn.Linear, torch.nn.ReLU
    return torch.nn.Sequential(
        linear(width, 1024), relu(), torch.nn.Identity(), linear(1024, 16), relu(), linear(16, 2)
    )
