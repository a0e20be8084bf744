"""A vision-language model as a judge: yes-or-no questions about a video (arXiv 2404.01291).

Any Qwen2-VL, Qwen2.5-VL or Qwen3-VL of transformers. Its processor writes the tokens; the pixels
take a differentiable path of the same arithmetic.

Shape legend: B videos, C channels, T frames, H height, W width, D width of the language model.
"""

import copy
import math
import re
from typing import Any

import torch

from rewards.common.base import ModelReward
from rewards.common.checkpointing import recompute_in_backward
from rewards.common.frames import apply_in_chunks, check_positive, choose_frames
from rewards.common.preprocess import resize
from rewards.common.qwen_vl import patchify
from rewards.common.weights import from_pretrained, load_pretrained, torch_dtype
from rewards.contract import RewardError, at_least_float32

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
QUESTION = 'Does this video show "{prompt}"? Answer with Yes or No.'
ANSWERS = ("Yes", "No")
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:\s*/\s*\d+)?")  # "7", "7.5" or "7/10", of which 7 counts
# Sizes of Qwen2.5-VL-7B-Instruct, as in its config.json.
SIZES = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584, "tokens_per_second": 2},
}


class VlmQuestion(ModelReward):
    """The mean over questions of log p(yes) - log p(no), weighed.

    questions   texts with {prompt} in them: one, a list, or {question: weight}
    answers     the two answers, each one token of the model
    generate    the model writes an answer and the number in it is the score, which has no gradient:
                for evaluation, with questions that ask for a number
    model       hub id or folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL
    max_pixels  upper bound of the model's processor for the size of videos: of a frame, or of all
                for Qwen3-VL; None: the processor's own
    max_tokens  of a written answer
    options     settings of ModelReward; chunk counts videos; the defaults are bfloat16, all frames
                decoded and two of them a second scored

    Raises RewardError for missing weights, and for a written answer without exactly one number.
    """

    name = "vlm_question"

    def __init__(
        self,
        questions: str | list[str] | dict[str, float] = QUESTION,
        answers: list[str] | tuple[str, str] = ANSWERS,
        generate: bool = False,
        model: str | tuple[torch.nn.Module, Any] = MODEL,
        max_pixels: int | None = None,
        max_tokens: int = 16,
        dtype: str = "bfloat16",
        frames: str | int = "all",
        num_frames: int | str | None = "2 fps",
        **options,
    ):
        super().__init__(dtype=dtype, frames=frames, num_frames=num_frames, **options)
        check_positive(self.name, max_pixels=max_pixels, max_tokens=max_tokens)
        self.questions = _question_weights(questions)
        self.model, self.processor = self._load(model) if isinstance(model, str) else model
        self.differentiable, self.max_tokens = not generate, max_tokens
        if max_pixels is not None:
            size = dict(self.processor.video_processor.size)
            size |= {"longest_edge": max_pixels, "shortest_edge": min(size["shortest_edge"], max_pixels)}
            self.processor.video_processor.size = size
        self.answer_ids = self._answer_ids(answers)
        recompute_in_backward([*self.model.model.visual.blocks, *self.model.model.language_model.layers])
        self.freeze()

    def _load(self, model: str) -> tuple[torch.nn.Module, Any]:
        """Load model and processor. Raises RewardError for another family."""
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        family = from_pretrained(self.name, AutoConfig, model).model_type
        if family not in FAMILIES:
            got, cure = f"{model!r}, a model of type {family}", "choose such a model"
            raise RewardError(self.name, got=got, expected=f"one of {', '.join(FAMILIES)}", cure=cure)
        processor = from_pretrained(self.name, AutoProcessor, model)
        return load_pretrained(self.name, AutoModelForImageTextToText, model, dtype=self.dtype), processor

    @classmethod
    def random_init(cls, dtype: str = "bfloat16", **settings) -> "VlmQuestion":
        """Build the reward at full size with random weights on torch's default device."""
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        model = Qwen2_5_VLForConditionalGeneration._from_config(
            Qwen2_5_VLConfig(**SIZES), dtype=torch_dtype(cls.name, dtype)
        )
        return cls(model=(model, byte_processor(model.config)), dtype=dtype, **settings)

    def check_prompts(self, prompts: list[str]) -> None:
        """Raise RewardError for a prompt that has a special token of the model in it."""
        special = [*map(str, self.processor.tokenizer.added_tokens_decoder.values())]
        for prompt in prompts:
            if found := next((token for token in special if token in prompt), None):
                got, expected = f"the prompt {str(prompt)!r} with {found} in it", "a prompt without the model's tokens"
                raise RewardError(self.name, got=got, expected=expected, cure="take it out of the prompt")

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        """Return each video's weighted mean of the answers to all questions, (B,)."""
        self.check_prompts(prompts)
        chosen = choose_frames(self.name, self.num_frames, video_BCTHW.shape[2], info)
        clock = {"total_num_frames": video_BCTHW.shape[2], "fps": info.get("fps") or 1.0, "frames_indices": chosen}

        def score(videos_BCTHW: torch.Tensor, rows_B: torch.Tensor) -> torch.Tensor:
            pairs = zip(videos_BCTHW, rows_B.tolist(), strict=True)
            return torch.stack([self._ask_all(video, prompts[row], clock) for video, row in pairs])

        rows_B = torch.arange(len(prompts), device=video_BCTHW.device)
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            return apply_in_chunks(score, self.chunk, video_BCTHW[:, :, chosen], rows_B)

    def _ask_all(self, video_CTHW: torch.Tensor, prompt: str, clock: dict) -> torch.Tensor:
        """Return one video's weighted mean over questions of log-odds or written numbers, 0-d."""
        if video_CTHW.shape[1] == 1:  # the model reads frames in pairs
            video_CTHW = video_CTHW.expand(-1, 2, -1, -1)
            clock = clock | {"frames_indices": clock["frames_indices"] * 2}
        ask = self._log_odds if self.differentiable else self._written_number
        total = sum(
            weight * ask(video_CTHW, text.replace("{prompt}", prompt), clock) for text, weight in self.questions.items()
        )
        return total / sum(map(abs, self.questions.values()))

    def _log_odds(self, video_CTHW: torch.Tensor, question: str, clock: dict) -> torch.Tensor:
        """Return log p(yes) - log p(no) of the next token, 0-d, in at least float32."""
        states_1LD = self.model.model(**self._inputs(video_CTHW, question, clock), use_cache=False).last_hidden_state
        yes_D, no_D = at_least_float32(self.model.get_output_embeddings().weight[self.answer_ids])
        return at_least_float32(states_1LD[0, -1]) @ (yes_D - no_D)  # the normalisation cancels

    @torch.no_grad()
    def _written_number(self, video_CTHW: torch.Tensor, question: str, clock: dict) -> torch.Tensor:
        """Return the number in the model's answer, 0-d float32. Raises RewardError without one."""
        inputs = self._inputs(video_CTHW, question, clock)
        settings = {"max_new_tokens": self.max_tokens, "do_sample": False, "temperature": None, "top_p": None}
        written_1L = self.model.generate(**inputs, **settings, top_k=None)[:, inputs["input_ids"].shape[1] :]
        answer = self.processor.tokenizer.decode(written_1L[0], skip_special_tokens=True)
        return torch.tensor(read_number(self.name, answer, question), device=video_CTHW.device)

    def _inputs(self, video_CTHW: torch.Tensor, question: str, clock: dict) -> dict[str, torch.Tensor]:
        """Return the model's inputs: the processor's, with pixels that have a gradient."""
        reader = self.processor.video_processor
        content = [{"type": "video"}, {"type": "text", "text": question}]
        chat = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        blank_TCHW = torch.zeros(video_CTHW.transpose(0, 1).shape, dtype=torch.uint8, device="cpu")
        inputs = self.processor(
            text=[chat],
            videos=[blank_TCHW],
            video_metadata=[copy.deepcopy(clock)],  # Qwen3-VL's processor appends to its indices
            do_sample_frames=False,
            cap_pixels_per_frame=False,
            return_tensors="pt",
        )
        time, rows, columns = inputs["video_grid_thw"][0].tolist()
        frames_TCHW = resize(video_CTHW.transpose(0, 1), rows * reader.patch_size, columns * reader.patch_size)
        padding = time * reader.temporal_patch_size - len(frames_TCHW)
        frames_TCHW = torch.cat([frames_TCHW, frames_TCHW[-1:].expand(padding, -1, -1, -1)])
        mean, std = (frames_TCHW.new_tensor(x)[:, None, None] for x in (reader.image_mean, reader.image_std))
        pixels_1CTHW = ((frames_TCHW - mean) / std).transpose(0, 1)[None]
        patches, _ = patchify(pixels_1CTHW, reader.patch_size, reader.merge_size, reader.temporal_patch_size)
        given = {name: value.to(self.device) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        return given | {"pixel_values_videos": patches[0].to(self.model.dtype)}

    def _answer_ids(self, answers: list[str] | tuple[str, str]) -> list[int]:
        """Return the token ids of both answers. Raises RewardError unless each is one token."""
        if not isinstance(answers, list | tuple) or [*map(type, answers)] != [str, str]:
            cure = 'write both in quotes, as in ["Yes", "No"]: YAML takes a bare Yes for true'
            raise RewardError(self.name, got=f"answers={answers!r}", expected="two texts", cure=cure)
        ids = [self.processor.tokenizer.encode(answer, add_special_tokens=False) for answer in answers]
        if not all(len(found) == 1 for found in ids) or ids[0] == ids[1]:
            got, cure = f"answers={answers!r} of {len(ids[0])} and {len(ids[1])} tokens", "choose shorter words"
            raise RewardError(self.name, got=got, expected="two words of one token each", cure=cure)
        return [found[0] for found in ids]


def read_number(name: str, answer: str, question: str) -> float:
    """Return the only number in an answer; of "7/10" it is 7. Raises RewardError."""
    found = NUMBER.findall(answer)
    if len(found) != 1 or not math.isfinite(number := float(found[0].split("/")[0])):
        got = f"the answer {answer!r} to {question!r}, with {len(found)} numbers in it"
        raise RewardError(
            name, got=got, expected="exactly one number", cure='let the question end with "Answer with a number only."'
        )
    return number


def _question_weights(questions: str | list[str] | dict[str, float]) -> dict[str, float]:
    """Return {question: weight}, 1 where none is given. Raises RewardError for anything else."""
    given = [questions] if isinstance(questions, str) else questions
    given = dict.fromkeys(given, 1.0) if isinstance(given, list | tuple) else given
    is_number = lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if (
        not isinstance(given, dict)
        or not any(given.values())
        or not all(isinstance(x, str) and x.strip() for x in given)
    ):
        got, cure = f"questions={questions!r}", 'write them as texts, such as "Is the {prompt} whole?"'
        raise RewardError(VlmQuestion.name, got=got, expected="a question, a list, or {question: weight}", cure=cure)
    if wrong := next((text for text, weight in given.items() if not is_number(weight)), None):
        got = f"the weight {given[wrong]!r} of {wrong!r}"
        raise RewardError(VlmQuestion.name, got=got, expected="a number", cure="correct the weight")
    return given


def byte_processor(config: Any) -> Any:
    """Return a processor that replaces the published one for random models: one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    ids = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    ids |= {answer: len(ids) + i for i, answer in enumerate(ANSWERS)}
    ids |= {"<|vision_start|>": config.vision_start_token_id, "<|vision_end|>": config.vision_end_token_id}
    ids |= {"<|image_pad|>": config.image_token_id, "<|video_pad|>": config.video_token_id}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([name for name in ids if name.startswith("<|")])
    tokenizer.add_tokens([*ANSWERS])
    template = (
        "{% for message in messages %}{% for content in message['content'] %}{% if content['type'] == 'video' %}"
        "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    readers = Qwen2VLImageProcessor(), PreTrainedTokenizerFast(tokenizer_object=tokenizer), Qwen2VLVideoProcessor()
    return Qwen2_5_VLProcessor(*readers, chat_template=template)
