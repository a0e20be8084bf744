"""VideoScore v1.1: human ratings of five aspects by Mantis-8B-Idefics2 (arXiv 2406.15252).

Source: TIGER-AI-Lab/VideoScore, examples/run_videoscore.py, and TIGER-AI-Lab/Mantis,
modeling_idefics2.py; MIT and Apache-2.0. VideoScore2 is not offered: it writes scores as text,
which has no gradient.

Shape legend: B batch, C channels, T frames, N frames that are scored, H height, W width, V visual
tokens of a frame, L text tokens, D width of the language model.
"""

import math
from pathlib import Path

import torch

from rewards.common.base import FrozenReward
from rewards.common.checkpointing import recompute_in_backward
from rewards.common.frames import apply_in_chunks, check_positive
from rewards.common.heads import dimension_weights
from rewards.common.preprocess import resize
from rewards.common.qwen_vl import fake_tokenizer
from rewards.common.weights import Frozen, from_pretrained, load_pretrained, torch_dtype
from rewards.contract import RewardError, at_least_float32

VIDEO_SCORE = "TIGER-Lab/VideoScore-v1.1"
ASPECTS = ("visual_quality", "temporal_consistency", "dynamic_degree", "text_alignment", "factual_consistency")
AROUND, IMAGE = "<fake_token_around_image>", "<image>"

# The prompt template of training, verbatim: examples/run_videoscore.py of TIGER-AI-Lab/VideoScore
# (MIT): REGRESSION_QUERY_PROMPT. Any change shifts the scores.
PROMPT = Path(__file__).with_name("prompts").joinpath("video_score.txt").read_text(encoding="utf-8")

# Sizes of HuggingFaceM4/idefics2-8b, which Mantis kept, as in its config.json, and the five
# aspects; the rest are defaults of MistralConfig.
SIZES = {
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 32003,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
    },
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 980,
        "patch_size": 14,
    },
    "perceiver_config": {"rms_norm_eps": 1e-5},
    "num_labels": 5,
}


class VideoScore(FrozenReward):
    """One of five aspects of a video, or their mean; 1 (bad) to 4 (as if real) usual.

    dimension   "visual_quality", "temporal_consistency", "dynamic_degree", "text_alignment",
                "factual_consistency" or "mean"; or weights, such as {dynamic_degree: 1,
                text_alignment: 1}: all are read in one pass
    model       the published repository, or a folder with its files
    max_frames  frames that are scored, evenly spaced, where the video has more; the model was
                trained for up to 48
    options     settings of FrozenReward; chunk counts frames in the vision tower; the default dtype
                is bfloat16

    Current transformers shift three patch positions by one, relative to the version of training
    (4.4x), in grids of 49 or 58 patches a side (686 to 699 and 812 to 825 pixels).

    Raises RewardError for weights that are missing or incomplete.
    """

    name, frames = "video_score", "all"

    def __init__(
        self,
        dimension: str | dict[str, float] = "mean",
        model: "str | Idefics2Scorer" = VIDEO_SCORE,
        max_frames: int = 48,
        dtype: str = "bfloat16",
        **options,
    ):
        super().__init__(dtype=dtype, **options)
        check_positive(self.name, max_frames=max_frames)
        self.weights = dimension_weights(self.name, dimension, ASPECTS, "mean", 1 / len(ASPECTS))
        self.scorer = model if isinstance(model, Idefics2Scorer) else load_scorer(self.name, model, self.dtype)
        self.max_frames = max_frames
        self.freeze()

    @classmethod
    def random_init(cls, dtype: str = "bfloat16", **settings) -> "VideoScore":
        """Build the reward at full size with random weights on torch's default device."""
        return cls(model=random_scorer(SIZES, torch_dtype(cls.name, dtype)), dtype=dtype, **settings)

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        """Return the weighted sum (B,) of `aspects`, in at least float32."""
        scores_B5 = self.aspects(video_BCTHW, prompts)
        return (scores_B5 * scores_B5.new_tensor(self.weights)).sum(1)

    def aspects(self, video_BCTHW: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return scores (B, 5) in the order of `ASPECTS`."""
        video_BCNHW = video_BCTHW[:, :, subsample_indices(self.max_frames, video_BCTHW.shape[2])]
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            frames_NCHW = video_BCNHW.transpose(1, 2).flatten(0, 1)
            visual_NVD = apply_in_chunks(self.scorer.visual_tokens, self.chunk, frames_NCHW)
            return self.scorer(visual_NVD.unflatten(0, (len(prompts), -1)).flatten(1, 2), self._texts(prompts))

    def _texts(self, prompts: list[str]) -> list[str]:
        """Return the filled templates; raise RewardError for a prompt with image tokens."""
        for prompt in prompts:
            if IMAGE in prompt or AROUND in prompt:
                expected, cure = "a prompt without the tokens that stand for frames", "take it out of the prompt"
                raise RewardError(self.name, got=f"{IMAGE} in the prompt {prompt!r}", expected=expected, cure=cure)
        return [PROMPT.format(text_prompt=prompt) for prompt in prompts]


class Idefics2Scorer(Frozen):
    """An Idefics2 with a head on its last token.

    model     Idefics2Model of transformers
    head      float32, (.., D) -> (.., aspects)
    encode    text -> token ids, with image tokens
    image_id  id of the tokens that visual tokens replace
    edges     bounds of the sides of a resized frame
    """

    def __init__(self, model, head: torch.nn.Module, encode, image_id: int, edges: tuple[int, int] = (378, 980)):
        super().__init__()
        self.model, self.head = model, head
        self.encode, self.image_id, self.edges = encode, image_id, edges
        vision, resampler = model.vision_model.encoder, model.connector.perceiver_resampler
        recompute_in_backward([*vision.layers, *resampler.layers, *model.text_model.layers])
        self.freeze()

    def visual_tokens(self, frames_NCHW: torch.Tensor) -> torch.Tensor:
        """Return visual tokens (N, V, D) of frames in [0, 1].

        `get_image_features` of the model is not used: it takes a uniformly grey frame for padding.
        """
        pixels_NCHW = resize(frames_NCHW, *target_size(*frames_NCHW.shape[-2:], *self.edges), "bilinear")
        pixels_NCHW = ((pixels_NCHW - 0.5) / 0.5).to(self.model.dtype)
        patches_NPD = self.model.vision_model(pixel_values=pixels_NCHW).last_hidden_state
        whole_NP = torch.ones(patches_NPD.shape[:2], dtype=torch.bool, device=patches_NPD.device)
        return self.model.connector(patches_NPD, attention_mask=whole_NP)

    def forward(self, visual_BVD: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """Return scores (B, aspects), in at least float32, of visual tokens and texts."""
        device, text = visual_BVD.device, self.model.text_model
        per_frame = self.model.config.perceiver_config.resampler_n_latents
        images = f"{AROUND}{IMAGE * per_frame}{AROUND} " * (visual_BVD.shape[1] // per_frame)
        rows = [torch.tensor(self.encode(words + images), device=device) for words in texts]
        ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # causal attention: no token sees the padding
        embeds_BLD = text.get_input_embeddings()(ids_BL)
        embeds_BLD = embeds_BLD.masked_scatter((ids_BL == self.image_id)[..., None], visual_BVD.to(embeds_BLD))
        positions_1L = torch.arange(ids_BL.shape[1], device=device)[None]
        hidden_BLD = text(inputs_embeds=embeds_BLD, position_ids=positions_1L, use_cache=False).last_hidden_state
        last_B = torch.tensor([len(row) - 1 for row in rows], device=device)
        return self.head(at_least_float32(hidden_BLD[torch.arange(len(rows), device=device), last_B]))


def target_size(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """Return the resized height and width: at most `longest`, then at least `shortest`."""
    ratio = width / height
    if width >= height and width > longest:
        height, width = int(longest / ratio), longest
    elif height > width and height > longest:
        height, width = longest, int(longest * ratio)
    return max(height, shortest), max(width, shortest)


def subsample_indices(limit: int, total: int) -> list[int]:
    """Return all indices if total <= limit, else `limit` of them at equal steps from the first."""
    if total <= limit:
        return list(range(total))
    step = total / limit
    return [int(i * step) for i in range(math.ceil(total / step))]  # as numpy.arange(0, total, step) rounds


# ---------------------------------------------------------------- weights


def load_scorer(name: str, model: str, dtype: torch.dtype) -> Idefics2Scorer:
    """Load model, tokenizer and frame sizes from hub or folder.

    Raises RewardError for missing files, and a processor that splits images.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    config = from_pretrained(name, AutoConfig, model)
    # In training the resampler used the language model's epsilon; newer transformers have another
    # default.
    config.perceiver_config.rms_norm_eps = config.text_config.rms_norm_eps
    tuned = load_pretrained(name, model_class(), model, config=config, dtype=dtype)
    processor = from_pretrained(name, AutoImageProcessor, model)
    if processor.do_image_splitting:
        got, expected = f"do_image_splitting in {model!r}", "whole frames, as VideoScore was trained on"
        raise RewardError(name, got=got, expected=expected, cure="set it to false in preprocessor_config.json")
    tokenizer = from_pretrained(name, AutoTokenizer, model)
    head = tuned.score.to(torch.promote_types(dtype, torch.float32))
    edges = processor.size["shortest_edge"], processor.size["longest_edge"]
    return Idefics2Scorer(tuned.model, head, tokenizer.encode, tokenizer.convert_tokens_to_ids(IMAGE), edges)


def model_class() -> type[torch.nn.Module]:
    """Return the class of Mantis: Idefics2 with a linear head for each aspect."""
    from transformers import Idefics2Model, Idefics2PreTrainedModel

    class Idefics2ForSequenceClassification(Idefics2PreTrainedModel):
        _keep_in_fp32_modules_strict = {"score"}

        def __init__(self, config):
            super().__init__(config)
            self.model = Idefics2Model(config)
            self.score = torch.nn.Linear(config.text_config.hidden_size, config.num_labels)
            self.post_init()

    return Idefics2ForSequenceClassification


def random_scorer(sizes: dict, dtype: torch.dtype) -> Idefics2Scorer:
    """Build a scorer of these Idefics2Config settings with random weights."""
    from transformers import Idefics2Config

    config = Idefics2Config(**sizes)
    tuned = model_class()._from_config(config, dtype=dtype)
    ids = {AROUND: config.image_token_id - 1, IMAGE: config.image_token_id}
    encode = fake_tokenizer(ids)
    return Idefics2Scorer(tuned.model, tuned.score.float(), encode, config.image_token_id)
