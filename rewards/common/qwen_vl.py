"""Qwen2-VL as a reward: frames and a prompt in, what its head reads at special tokens out (arXiv 2409.12191).

Everything from pixels to score is a tensor operation, so that the gradient reaches the pixels: resize, patches, vision
tower, language model. Positions are those that the published reward models were trained with, see `QwenVl`.

Shape legend: N videos or images, C channels, T frames, H height, W width, V visual tokens, L text tokens, R reward
tokens, D width of the language model, K outputs of the head.
"""

import math
import re
from collections.abc import Callable

import torch

from rewards.common.checkpointing import recompute_in_backward
from rewards.common.preprocess import CLIP_MEAN, CLIP_STD, resize
from rewards.common.weights import Frozen, filled, from_pretrained, tensor_of
from rewards.contract import RewardError, at_least_float32

# The chat template of Qwen/Qwen2-VL-*-Instruct (Apache-2.0) for one user turn of an image or video and a text.
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER = "<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"


class QwenVl(Frozen):
    """A Qwen2-VL with a head on its hidden states at reward tokens.

    model          Qwen2VLModel of transformers
    head           float32, (.., D) -> (.., K)
    encode         text -> token ids, special tokens in the text included
    reward_tokens  token -> id

    Token positions are 0, 1, 2, ... on all three axes. The published models ran on transformers 4.45 without position
    ids, which means just that; the position ids in space and time of today's transformers give other scores.
    """

    def __init__(self, model, head: torch.nn.Module, encode: Callable, reward_tokens: dict[str, int]):
        super().__init__()
        self.model, self.head = model, head
        self.encode, self.reward_tokens = encode, reward_tokens
        vision = model.config.vision_config
        self.patch, self.merge, self.frames_each = (
            vision.patch_size,
            vision.spatial_merge_size,
            vision.temporal_patch_size,
        )
        recompute_in_backward([*model.visual.blocks, *model.language_model.layers])
        self.freeze()

    def fit(self, video_NCTHW: torch.Tensor, min_pixels: int, max_pixels: int) -> torch.Tensor:
        """Frames in [0, 1], resized (bicubic) to whole tokens and a number of pixels between the two."""
        height, width = target_size(*video_NCTHW.shape[-2:], self.patch * self.merge, min_pixels, max_pixels)
        return resize(video_NCTHW.flatten(1, 2), height, width).unflatten(1, video_NCTHW.shape[1:3])

    def tokens(self, name: str, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, L) ids of what follows the frames, padded behind, and (N, R) where the reward tokens are in it."""
        rows = [torch.tensor(self.encode(AFTER.format(text=text))) for text in texts]
        where = [
            [_only_place(name, row, token, number) for token, number in self.reward_tokens.items()] for row in rows
        ]
        ids_NL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # no token looks ahead, so none sees padding
        return ids_NL.to(self.device), torch.tensor(where, device=self.device)

    def forward(self, video_NCTHW: torch.Tensor, ids_NL: torch.Tensor, where_NR: torch.Tensor) -> torch.Tensor:
        """(N, R, K), in at least float32, of fitted frames and `tokens`."""
        text, embed = self.model.language_model, self.model.language_model.embed_tokens
        before_1L = torch.tensor([self.encode(BEFORE)], device=self.device)
        visual_NVD = self.see(video_NCTHW)
        embeds = [embed(before_1L).expand(len(ids_NL), -1, -1), visual_NVD, embed(ids_NL)]
        embeds_NLD = torch.cat(embeds, dim=1)
        count, length = embeds_NLD.shape[:2]
        positions_3NL = torch.arange(length, device=self.device).expand(3, count, length)
        hidden_NLD = text(inputs_embeds=embeds_NLD, position_ids=positions_3NL, use_cache=False).last_hidden_state
        where_NR = where_NR + before_1L.shape[1] + visual_NVD.shape[1]
        hidden_NRD = hidden_NLD.gather(1, where_NR[..., None].expand(-1, -1, hidden_NLD.shape[2]))
        return self.head(at_least_float32(hidden_NRD))

    def see(self, video_NCTHW: torch.Tensor) -> torch.Tensor:
        """(N, V, D) visual tokens of frames in [0, 1], a single frame counting as two alike."""
        if video_NCTHW.shape[2] == 1:
            video_NCTHW = video_NCTHW.expand(-1, -1, self.frames_each, -1, -1)
        mean, std = (video_NCTHW.new_tensor(x)[:, None, None, None] for x in (CLIP_MEAN, CLIP_STD))
        patches, grid = patchify((video_NCTHW - mean) / std, self.patch, self.merge, self.frames_each)
        grid_N3 = torch.tensor([grid] * len(patches), device=self.device)
        tokens = self.model.visual(patches.flatten(0, 1).to(self.model.dtype), grid_thw=grid_N3).pooler_output
        return tokens.unflatten(0, (len(patches), -1))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def _only_place(name: str, ids_L: torch.Tensor, token: str, number: int) -> int:
    places = (ids_L == number).nonzero().flatten().tolist()
    if len(places) != 1:
        got, expected = f"a prompt with {token} in it", "a prompt without the tokens that the score is read at"
        raise RewardError(name, got=got, expected=expected, cure="take it out of the prompt")
    return places[0]


def target_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width as Qwen2-VL resizes them: multiples of `factor`, area between the two, shape nearly kept.

    Source: smart_resize of qwen-vl-utils and transformers.
    """
    fitted = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if fitted[0] * fitted[1] > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        fitted = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif fitted[0] * fitted[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        fitted = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return fitted[0], fitted[1]


def patchify(
    video_NCTHW: torch.Tensor, patch: int, merge: int, frames_each: int
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """(N, patches, C * frames_each * patch^2), and their grid (time, rows, columns).

    Patches that will be merged into one token (merge x merge) stand side by side, as Qwen2-VL's processor orders them.
    """
    _, channels, frames, height, width = video_NCTHW.shape
    time, rows, columns = frames // frames_each, height // patch, width // patch
    split = (channels, time, frames_each, rows // merge, merge, patch, columns // merge, merge, patch)
    x = video_NCTHW.reshape(-1, *split).permute(0, 2, 4, 7, 5, 8, 1, 3, 6, 9)
    return x.flatten(6).flatten(1, 5), (time, rows, columns)


# ---------------------------------------------------------------- weights


def load_qwen_vl(
    name: str, model: str, state: dict, head: torch.nn.Module, tokens: list[str], dtype: torch.dtype
) -> QwenVl:
    """A QwenVl with the weights in `state`, under the names of transformers 4.45 or today's.

    model   hub id or folder of the Qwen2-VL that was tuned: its configuration and tokenizer, not its weights
    head    a module with the sizes of the head, filled with rm_head.*
    tokens  the reward tokens, in the order in which they were added behind the vocabulary
    """
    from transformers import AutoConfig, AutoTokenizer, Qwen2VLModel

    tokenizer = from_pretrained(name, AutoTokenizer, model)
    tokenizer.add_tokens(tokens, special_tokens=True)
    backbone, head_state = backbone_and_head(state, dtype)
    config = from_pretrained(name, AutoConfig, model)
    config.text_config.vocab_size = _rows(name, model, backbone, len(tokenizer))
    vlm = filled(name, "the checkpoint", lambda: Qwen2VLModel(config), backbone)
    head = filled(name, "the checkpoint", lambda: head, head_state).to(torch.promote_types(dtype, torch.float32))
    ids = dict(zip(tokens, tokenizer.convert_tokens_to_ids(tokens), strict=True))
    return QwenVl(vlm, head, lambda text: tokenizer.encode(text, add_special_tokens=False), ids)


def backbone_and_head(state: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[dict, dict]:
    """The weights of Qwen2VLModel, in dtype, and those of rm_head; what predicts words is left out."""
    named = {today(key): tensor for key, tensor in state.items()}
    backbone = {
        key.removeprefix("model."): tensor.to(dtype) for key, tensor in named.items() if key.startswith("model.")
    }
    return backbone, {key.removeprefix("rm_head."): named[key] for key in named if key.startswith("rm_head.")}


def today(key: str) -> str:
    """The name of a weight of Qwen2VLForConditionalGeneration since transformers 4.52, from that or the older one."""
    if key.startswith("visual."):
        return f"model.{key}"
    return re.sub(r"^model\.(?!visual\.|language_model\.)", "model.language_model.", key)


def _rows(name: str, model: str, state: dict, expected: int) -> int:
    rows = len(tensor_of(name, state, "language_model.embed_tokens.weight"))
    if rows != expected:
        got, wanted = f"a tokenizer of {expected} tokens from {model!r}", f"{rows}, as the checkpoint has embeddings"
        raise RewardError(name, got=got, expected=wanted, cure="set `model` to the model that was tuned")
    return rows


def merge_lora(state: dict[str, torch.Tensor], alpha: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of a PEFT state dict with W + alpha / r * B A in place of W, A and B; computed in float32."""
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
    merged = {}
    for key, tensor in state.items():
        if key.endswith(".base_layer.weight"):
            stem = key.removesuffix(".base_layer.weight")
            A, B = (at_least_float32(state[f"{stem}.lora_{x}.default.weight"]) for x in "AB")
            tensor = (tensor + alpha / len(A) * (B @ A)).to(dtype)
        if ".lora_" not in key:
            merged[key.replace(".base_layer.", ".")] = tensor
    return merged


def qwen2_vl_sizes(vocabulary: int, width: int, inner: int, heads: int, key_value_heads: int) -> dict:
    """Sizes of a Qwen2-VL-*-Instruct, as in its config.json.

    The arguments are the language model's; the vision tower is the same in all of them.
    """
    return {
        "text_config": {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": 28,
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {"hidden_size": width},
    }


def random_qwen_vl(sizes: dict, head: torch.nn.Module, tokens: list[str], dtype: torch.dtype) -> QwenVl:
    """A QwenVl of these sizes (Qwen2VLConfig) with random weights, on torch's default device, without hub or disk."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    config = Qwen2VLConfig(**sizes)
    first = config.text_config.vocab_size - len(tokens)
    ids = {token: first + i for i, token in enumerate(tokens)}
    return QwenVl(Qwen2VLModel._from_config(config, dtype=dtype), head, stand_in_encoder(ids), ids)


def stand_in_encoder(ids: dict[str, int]) -> Callable[[str], list[int]]:
    """text -> ids where the model's own tokenizer is not at hand: `ids` for special tokens, and below them OpenAI's
    vocabulary, which comes with open_clip, for about as many tokens."""
    import open_clip

    tokenizer, special = open_clip.SimpleTokenizer(), re.compile(f"({'|'.join(map(re.escape, ids))})")

    words = min(ids.values())

    def encode(text: str) -> list[int]:
        pieces = special.split(text)
        return [i for piece in pieces for i in ([ids[piece]] if piece in ids else _below(words, tokenizer, piece))]

    return encode


def _below(limit: int, tokenizer, text: str) -> list[int]:
    return [token % limit for token in tokenizer.encode(text)]
