"""VideoScore v1.1: five aspects of a generated video as people rated them, by Mantis-8B-Idefics2 (arXiv 2406.15252).

Source: TIGER-AI-Lab/VideoScore, examples/run_videoscore.py, and TIGER-AI-Lab/Mantis, modeling_idefics2.py; MIT and
Apache-2.0. Its successor, VideoScore2, writes its scores in text, so they have no gradient: it is not offered here.

Shape legend: B batch, C channels, T frames, N frames that are scored, H height, W width, V visual tokens of a frame,
L text tokens, D width of the language model.
"""

import math

import torch

from rewards.common.checkpointing import recompute_in_backward
from rewards.common.dimensions import dimension_weights
from rewards.common.frames import check_positive, in_chunks
from rewards.common.preprocess import resize
from rewards.common.qwen_vl import stand_in_encoder
from rewards.common.weights import Frozen, from_pretrained, load_pretrained, torch_dtype
from rewards.contract import RewardError, at_least_float32

VIDEO_SCORE = "TIGER-Lab/VideoScore-v1.1"
ASPECTS = ("visual_quality", "temporal_consistency", "dynamic_degree", "text_alignment", "factual_consistency")
AROUND, IMAGE = "<fake_token_around_image>", "<image>"

# The text that the model was trained with, to the letter: REGRESSION_QUERY_PROMPT of examples/run_videoscore.py in
# TIGER-AI-Lab/VideoScore (MIT). Any change to it shifts the scores.
PROMPT = (
    "\n"
    "Suppose you are an expert in judging and evaluating the quality of AI-generated videos,\n"
    "please watch the following frames of a given video and see the text prompt for generating the video,\n"
    "then give scores from 5 different dimensions:\n"
    "(1) visual quality: the quality of the video in terms of clearness, resolution, brightness, and color\n"
    "(2) temporal consistency, both the consistency of objects or humans and the smoothness of motion or "
    "movements\n"
    "(3) dynamic degree, the degree of dynamic changes\n"
    "(4) text-to-video alignment, the alignment between the text prompt and the video content\n"
    "(5) factual consistency, the consistency of the video content with the common-sense and factual knowledge\n"
    "\n"
    "for each dimension, output a float number from 1.0 to 4.0,\n"
    "the higher the number is, the better the video performs in that sub-score, \n"
    "the lowest 1.0 means Bad, the highest 4.0 means Perfect/Real (the video is like a real video)\n"
    "Here is an output example:\n"
    "visual quality: 3.2\n"
    "temporal consistency: 2.7\n"
    "dynamic degree: 4.0\n"
    "text-to-video alignment: 2.3\n"
    "factual consistency: 1.8\n"
    "\n"
    'For this video, the text prompt is "{text_prompt}",\n'
    "all the frames of video are as follows:\n"
)

# Sizes of HuggingFaceM4/idefics2-8b, which Mantis kept, as in its config.json, and the five aspects.
SIZES = {
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 32003,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
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


class VideoScore(Frozen):
    """One aspect of a video on the raters' scale, 1 (bad) to 4 (as if real), or the mean of the five; not bounded.

    dimension   "visual_quality", "temporal_consistency", "dynamic_degree", "text_alignment", "factual_consistency" or
                "mean"; or weights, such as {dynamic_degree: 1, text_alignment: 1}: all are read in one pass
    model       the published repository, or a folder with its files
    max_frames  frames that are scored, evenly spaced, where the video has more; the model was trained for up to 48
    dtype       of the model; head and scores are float32 in any case
    chunk       frames in the vision tower at once, to bound memory; the result stays the same
    mean, std   the typical score, for mixing

    The score is read at the last token. Today's transformers places three patches in grids that are 49 or 58 patches
    wide or high (686 to 699 and 812 to 825 pixels) one step off where version 4.4x, which trained this, had them.

    Raises RewardError for weights that are missing or incomplete.
    """

    name, frames = "video_score", "all"

    def __init__(
        self,
        dimension: str | dict[str, float] = "mean",
        model: "str | Idefics2Scorer" = VIDEO_SCORE,
        max_frames: int = 48,
        dtype: str = "bfloat16",
        chunk: int | None = None,
        mean: float | None = None,
        std: float | None = None,
    ):
        super().__init__()
        check_positive(self.name, max_frames=max_frames, chunk=chunk)
        self.weights = dimension_weights(self.name, dimension, ASPECTS, "mean", 1 / len(ASPECTS))
        self.scorer = model if isinstance(model, Idefics2Scorer) else load_scorer(self.name, model, dtype)
        self.max_frames, self.chunk, self.mean, self.std = max_frames, chunk, mean, std
        self.freeze()

    @classmethod
    def random_init(cls, dtype: str = "bfloat16", **settings) -> "VideoScore":
        """Full size with random weights, on torch's default device, without hub or disk."""
        return cls(model=random_scorer(SIZES, torch_dtype(cls.name, dtype)), **settings)

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        scores_B5 = self.aspects(video_BCTHW, prompts)
        return (scores_B5 * scores_B5.new_tensor(self.weights)).sum(1)

    def aspects(self, video_BCTHW: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """(B, 5) scores in the order of `ASPECTS`."""
        video_BCNHW = video_BCTHW[:, :, frames_up_to(self.max_frames, video_BCTHW.shape[2])]
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            frames_NCHW = video_BCNHW.transpose(1, 2).flatten(0, 1)
            visual_NVD = in_chunks(self.scorer.see, self.chunk, frames_NCHW)
            return self.scorer(visual_NVD.unflatten(0, (len(prompts), -1)).flatten(1, 2), self._texts(prompts))

    def _texts(self, prompts: list[str]) -> list[str]:
        for prompt in prompts:
            if IMAGE in prompt or AROUND in prompt:
                expected, cure = "a prompt without the tokens that stand for frames", "take it out of the prompt"
                raise RewardError(self.name, got=f"{IMAGE} in the prompt {prompt!r}", expected=expected, cure=cure)
        return [PROMPT.format(text_prompt=prompt) for prompt in prompts]


class Idefics2Scorer(Frozen):
    """An Idefics2 with a head that is read at the last token.

    model     Idefics2Model of transformers
    head      float32, (.., D) -> (.., aspects)
    encode    text -> token ids, those of the images included
    image_id  the token that a visual token replaces
    edges     shortest and longest side that frames are resized to, if theirs is outside
    """

    def __init__(self, model, head: torch.nn.Module, encode, image_id: int, edges: tuple[int, int] = (378, 980)):
        super().__init__()
        self.model, self.head = model, head
        self.encode, self.image_id, self.edges = encode, image_id, edges
        vision, resampler = model.vision_model.encoder, model.connector.perceiver_resampler
        recompute_in_backward([*vision.layers, *resampler.layers, *model.text_model.layers])
        self.freeze()

    def see(self, frames_NCHW: torch.Tensor) -> torch.Tensor:
        """(N, V, D) visual tokens of frames in [0, 1].

        By the parts of the model, not its own `get_image_features`, which takes an evenly grey frame for padding.
        """
        pixels_NCHW = resize(frames_NCHW, *target_size(*frames_NCHW.shape[-2:], *self.edges), "bilinear")
        pixels_NCHW = ((pixels_NCHW - 0.5) / 0.5).to(self.model.dtype)
        patches_NPD = self.model.vision_model(pixel_values=pixels_NCHW).last_hidden_state
        whole_NP = torch.ones(patches_NPD.shape[:2], dtype=torch.bool, device=patches_NPD.device)
        return self.model.connector(patches_NPD, attention_mask=whole_NP)

    def forward(self, visual_BVD: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """(B, aspects), in at least float32, of all visual tokens of each video and its text."""
        device, text = visual_BVD.device, self.model.text_model
        per_frame = self.model.config.perceiver_config.resampler_n_latents
        images = f"{AROUND}{IMAGE * per_frame}{AROUND} " * (visual_BVD.shape[1] // per_frame)
        rows = [torch.tensor(self.encode(words + images), device=device) for words in texts]
        ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # no token looks ahead, so none sees padding
        embeds_BLD = text.get_input_embeddings()(ids_BL)
        embeds_BLD = embeds_BLD.masked_scatter((ids_BL == self.image_id)[..., None], visual_BVD.to(embeds_BLD))
        positions_1L = torch.arange(ids_BL.shape[1], device=device)[None]
        hidden_BLD = text(inputs_embeds=embeds_BLD, position_ids=positions_1L, use_cache=False).last_hidden_state
        last_B = torch.tensor([len(row) - 1 for row in rows], device=device)
        return self.head(at_least_float32(hidden_BLD[torch.arange(len(rows), device=device), last_B]))


def target_size(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """Height and width as Idefics2 resizes them: the longer side at most `longest`, each at least `shortest`."""
    ratio = width / height
    if width >= height and width > longest:
        height, width = int(longest / ratio), longest
    elif height > width and height > longest:
        height, width = longest, int(longest * ratio)
    return max(height, shortest), max(width, shortest)


def frames_up_to(most: int, total: int) -> list[int]:
    """Indices of all frames, or of `most` of them at equal steps from the first."""
    if total <= most:
        return list(range(total))
    step = total / most
    return [int(i * step) for i in range(math.ceil(total / step))]  # as numpy.arange(0, total, step) rounds


# ---------------------------------------------------------------- weights


def load_scorer(name: str, model: str, dtype: str) -> Idefics2Scorer:
    """The published model from hub or folder, with its tokenizer and the frame sizes of its image processor."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    config = from_pretrained(name, AutoConfig, model)
    # Versions that trained it took the language model's epsilon for the resampler too; today's has its own default.
    config.perceiver_config.rms_norm_eps = config.text_config.rms_norm_eps
    precision = torch_dtype(name, dtype)
    tuned = load_pretrained(name, model_class(), model, config=config, dtype=precision)
    processor = from_pretrained(name, AutoImageProcessor, model)
    if processor.do_image_splitting:
        got, expected = f"do_image_splitting in {model!r}", "whole frames, as VideoScore was trained on"
        raise RewardError(name, got=got, expected=expected, cure="set it to false in preprocessor_config.json")
    tokenizer = from_pretrained(name, AutoTokenizer, model)
    head = tuned.score.to(torch.promote_types(precision, torch.float32))
    edges = processor.size["shortest_edge"], processor.size["longest_edge"]
    return Idefics2Scorer(tuned.model, head, tokenizer.encode, tokenizer.convert_tokens_to_ids(IMAGE), edges)


def model_class() -> type[torch.nn.Module]:
    """Idefics2 with a linear head for each aspect, in the layout of Mantis' Idefics2ForSequenceClassification."""
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
    """A scorer of these sizes (Idefics2Config) with random weights, on torch's default device, without hub or disk."""
    from transformers import Idefics2Config

    config = Idefics2Config(**sizes)
    tuned = model_class()._from_config(config, dtype=dtype)
    ids = {AROUND: config.image_token_id - 1, IMAGE: config.image_token_id}
    encode = stand_in_encoder(ids)
    return Idefics2Scorer(tuned.model, tuned.score.float(), encode, config.image_token_id)
