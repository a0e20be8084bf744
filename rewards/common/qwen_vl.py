"""Qwen2-VL as a reward model that reads scores at special tokens (arXiv 2409.12191).

All steps from pixels to score are differentiable: resize, patches, vision tower, language model.

Shape legend: N videos or images, C channels, T frames, H height, W width, V visual tokens, L text
tokens, R reward tokens, D width of the language model, K outputs of the head.
"""

import math
import re
from collections.abc import Callable

import torch

from rewards.common.checkpointing import recompute_in_backward
from rewards.common.preprocess import CLIP_MEAN, CLIP_STD, resize
from rewards.common.weights import Frozen, build_from_state_dict, from_pretrained, require_tensor
from rewards.contract import RewardError, at_least_float32

# The chat template of Qwen/Qwen2-VL-*-Instruct (Apache-2.0) for one user turn of an image or video
# and a text.
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER = "<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"


class QwenVl(Frozen):
    """A Qwen2-VL with a head on its hidden states at reward tokens.

    model          Qwen2VLModel of transformers
    head           float32, (.., D) -> (.., K)
    encode         text -> token ids, with special tokens in the text
    reward_tokens  token -> id

    Token positions are 0, 1, 2, ... on all three axes, as in transformers 4.45 without position
    ids, with which the published models were trained. The three-axis position ids of later versions
    give other scores.
    """

    def __init__(self, model, head: torch.nn.Module, encode: Callable, reward_tokens: dict[str, int]):
        super().__init__()
        self.model, self.head = model, head
        self.encode, self.reward_tokens = encode, reward_tokens
        vision = model.config.vision_config
        self.patch, self.merge = vision.patch_size, vision.spatial_merge_size
        self.frames_each = vision.temporal_patch_size
        recompute_in_backward([*model.visual.blocks, *model.language_model.layers])
        self.freeze()

    def fit(self, video_NCTHW: torch.Tensor, min_pixels: int, max_pixels: int) -> torch.Tensor:
        """Resize frames (bicubic) to whole visual tokens, within min_pixels and max_pixels."""
        height, width = target_size(*video_NCTHW.shape[-2:], self.patch * self.merge, min_pixels, max_pixels)
        return resize(video_NCTHW.flatten(1, 2), height, width).unflatten(1, video_NCTHW.shape[1:3])

    def tokens(self, name: str, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return right-padded token ids (N, L) and the positions (N, R) of reward tokens."""
        rows = [torch.tensor(self.encode(AFTER.format(text=text))) for text in texts]
        where = [
            [_token_position(name, row, token, number) for token, number in self.reward_tokens.items()] for row in rows
        ]
        ids_NL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # causal attention: no token sees the padding
        return ids_NL.to(self.device), torch.tensor(where, device=self.device)

    def forward(self, video_NCTHW: torch.Tensor, ids_NL: torch.Tensor, where_NR: torch.Tensor) -> torch.Tensor:
        """Return scores (N, R, K), at least float32, of resized frames, token ids and positions."""
        text, embed = self.model.language_model, self.model.language_model.embed_tokens
        before_1L = torch.tensor([self.encode(BEFORE)], device=self.device)
        visual_NVD = self.visual_tokens(video_NCTHW)
        embeds = [embed(before_1L).expand(len(ids_NL), -1, -1), visual_NVD, embed(ids_NL)]
        embeds_NLD = torch.cat(embeds, dim=1)
        count, length = embeds_NLD.shape[:2]
        positions_3NL = torch.arange(length, device=self.device).expand(3, count, length)
        hidden_NLD = text(inputs_embeds=embeds_NLD, position_ids=positions_3NL, use_cache=False).last_hidden_state
        where_NR = where_NR + before_1L.shape[1] + visual_NVD.shape[1]
        hidden_NRD = hidden_NLD.gather(1, where_NR[..., None].expand(-1, -1, hidden_NLD.shape[2]))
        return self.head(at_least_float32(hidden_NRD))

    def visual_tokens(self, video_NCTHW: torch.Tensor) -> torch.Tensor:
        """Return visual tokens (N, V, D) of frames in [0, 1]; a single frame is repeated."""
        if video_NCTHW.shape[2] == 1:
            video_NCTHW = video_NCTHW.expand(-1, -1, self.frames_each, -1, -1)
        mean, std = (video_NCTHW.new_tensor(x)[:, None, None, None] for x in (CLIP_MEAN, CLIP_STD))
        patches, grid = patchify((video_NCTHW - mean) / std, self.patch, self.merge, self.frames_each)
        grid_N3 = torch.tensor([grid] * len(patches), device=self.device)
        tokens = self.model.visual(patches.flatten(0, 1).to(self.model.dtype), grid_thw=grid_N3).pooler_output
        return tokens.unflatten(0, (len(patches), -1))


def _token_position(name: str, ids_L: torch.Tensor, token: str, number: int) -> int:
    """Return the position of a reward token. Raises RewardError unless it occurs exactly once."""
    places = (ids_L == number).nonzero().flatten().tolist()
    if len(places) != 1:
        got, expected = f"a prompt with {token} in it", "a prompt without the tokens that the score is read at"
        raise RewardError(name, got=got, expected=expected, cure="take it out of the prompt")
    return places[0]


def target_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return height and width: multiples of `factor`, area within bounds, aspect ratio nearly kept.

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
    """Return patches (N, patches, C * frames_each * patch^2) and their grid (time, rows, columns).

    The merge x merge patches of one token are adjacent, in the order of Qwen2-VL's processor. The
    number of frames is a multiple of frames_each, height and width are multiples of patch * merge.
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
    """Build a QwenVl from a state dict with the keys of transformers 4.45 or later.

    model   hub id or folder of the base Qwen2-VL, for configuration and tokenizer only
    head    a module of the head's sizes, which gets the weights rm_head.*
    tokens  the reward tokens in the order of their ids, after the vocabulary

    Raises RewardError for missing files and other layouts.
    """
    from transformers import AutoConfig, AutoTokenizer, Qwen2VLModel

    tokenizer = from_pretrained(name, AutoTokenizer, model)
    tokenizer.add_tokens(tokens, special_tokens=True)
    backbone, head_state = split_backbone_and_head(state, dtype)
    config = from_pretrained(name, AutoConfig, model)
    config.text_config.vocab_size = _vocabulary_size(name, model, backbone, len(tokenizer))
    vlm = build_from_state_dict(name, "the checkpoint", lambda: Qwen2VLModel(config), backbone)
    head = build_from_state_dict(name, "the checkpoint", lambda: head, head_state).to(
        torch.promote_types(dtype, torch.float32)
    )
    ids = dict(zip(tokens, tokenizer.convert_tokens_to_ids(tokens), strict=True))
    return QwenVl(vlm, head, lambda text: tokenizer.encode(text, add_special_tokens=False), ids)


def split_backbone_and_head(state: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[dict, dict]:
    """Return the weights of Qwen2VLModel, in dtype, and those of rm_head."""
    named = {current_key_name(key): tensor for key, tensor in state.items()}
    backbone = {
        key.removeprefix("model."): tensor.to(dtype) for key, tensor in named.items() if key.startswith("model.")
    }
    return backbone, {key.removeprefix("rm_head."): named[key] for key in named if key.startswith("rm_head.")}


def current_key_name(key: str) -> str:
    """Return the key of a Qwen2VLForConditionalGeneration weight in transformers 4.52 and later."""
    if key.startswith("visual."):
        return f"model.{key}"
    return re.sub(r"^model\.(?!visual\.|language_model\.)", "model.language_model.", key)


def _vocabulary_size(name: str, model: str, state: dict, expected: int) -> int:
    """Return the number of embeddings in the checkpoint. Raises RewardError unless as expected."""
    rows = len(require_tensor(name, state, "language_model.embed_tokens.weight"))
    if rows != expected:
        got, wanted = f"a tokenizer of {expected} tokens from {model!r}", f"{rows}, as the checkpoint has embeddings"
        raise RewardError(name, got=got, expected=wanted, cure="set `model` to the model that was tuned")
    return rows


def merge_lora(state: dict[str, torch.Tensor], alpha: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return a PEFT state dict as a plain one, its LoRA merged in float32: W + alpha / r * B A.

    dtype: of the merged weights; other tensors keep theirs.
    """
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
    """Return the sizes of a Qwen2-VL-*-Instruct as in its config.json.

    The arguments are those of the language model; all sizes share one vision tower.
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
    """Build a QwenVl of these Qwen2VLConfig settings with random weights."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    config = Qwen2VLConfig(**sizes)
    first = config.text_config.vocab_size - len(tokens)
    ids = {token: first + i for i, token in enumerate(tokens)}
    return QwenVl(Qwen2VLModel._from_config(config, dtype=dtype), head, fake_tokenizer(ids), ids)


def fake_tokenizer(ids: dict[str, int]) -> Callable[[str], list[int]]:
    """Return a text -> ids function that replaces the tokenizer for random models.

    Special tokens get their `ids`. Other text is encoded with OpenAI's vocabulary of open_clip,
    wrapped to smaller ids.
    """
    import open_clip

    tokenizer, special = open_clip.SimpleTokenizer(), re.compile(f"({'|'.join(map(re.escape, ids))})")
    limit = min(ids.values())

    def encode(text: str) -> list[int]:
        pieces = special.split(text)
        rows = ([ids[piece]] if piece in ids else [i % limit for i in tokenizer.encode(piece)] for piece in pieces)
        return [i for row in rows for i in row]

    return encode
