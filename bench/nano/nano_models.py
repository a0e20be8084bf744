"""The untrained models of ContentV-nano: the classes of ContentV-8B at small size."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from rlhf.contentv.transformer import SD3Transformer3DModel
from rlhf.io import write_json
from rlhf.nano import world

MAX_TOKENS = 20  # of each text encoder; the longest caption has 14
TEXT_WIDTH = 128  # of T5; each CLIP encoder has half of it, so that both together fit
CLIP_MEAN, CLIP_STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
SAMPLING = {
    "height": 64,
    "width": 64,
    "num_frames": 17,
    "num_inference_steps": 4,
    "guidance_scale": 2.5,
    "fps": 8,
    "max_sequence_length": MAX_TOKENS,
    "negative_prompt": "",
}


def build_transformer() -> SD3Transformer3DModel:
    """Return an untrained MM-DiT of 6 joint blocks, with 4 heads of width 40."""
    return SD3Transformer3DModel(
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=40,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
    )


def build_vae() -> AutoencoderKLWan:
    """Return an untrained Wan VAE, 8x in space and 4x in time, with a small, fast decoder."""
    latents = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    return AutoencoderKLWan(base_dim=24, decoder_base_dim=16, num_res_blocks=1, **latents)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the scheduler: flow noise levels, shifted by 3."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def build_text_encoders(tokenizers: dict) -> dict[str, torch.nn.Module]:
    """Return two untrained CLIP encoders of width 64 and a T5 encoder of width 128, by name."""
    encoders = {}
    for name in ("", "_2"):
        tokenizer = tokenizers[f"tokenizer{name}"]
        encoders[f"text_encoder{name}"] = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH // 2,
                intermediate_size=2 * TEXT_WIDTH,
                projection_dim=TEXT_WIDTH // 2,
                num_hidden_layers=3,  # the second to last feeds joint attention, the last the pooled vector
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                hidden_act="gelu" if name else "quick_gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    encoders["text_encoder_3"] = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizers["tokenizer_3"]),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=16,
        )
    )
    return encoders


def build_tokenizers() -> dict:
    """Return CLIP byte-pair and T5 unigram tokenizers, trained on every caption of the world."""
    sentences = all_captions()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    splitters = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(splitters)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=list(LETTERS),
    )
    bpe.train_from_iterator(sentences, trainer)
    state = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    clip = CLIPTokenizer(vocab=_with_word_ends(state["vocab"]), merges=merges, model_max_length=MAX_TOKENS)

    words = Counter(word for sentence in sentences for word in re.findall(r"\w+", sentence))
    total = sum(words.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, math.log(n / total)) for word, n in words.most_common()]
    pieces += [(letter, -20.0) for letter in "▁" + LETTERS]
    t5 = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)
    return {"tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": t5}


def _with_word_ends(vocab: dict[str, int]) -> dict[str, int]:
    """Add every letter as the end of a word, so that no lower-case word is unknown."""
    vocab = dict(vocab)
    for letter in [k for k in vocab if len(k) == 1]:
        vocab.setdefault(letter + "</w>", len(vocab))
    return vocab


def all_captions() -> list[str]:
    """Return every caption of the world, in the order of `caption_index`."""
    grid = torch.cartesian_prod(*map(torch.arange, world.NUM_VALUES.values())).tolist()
    scenes = [dict(zip(world.NUM_VALUES, row, strict=True)) for row in grid]
    wordings = [(s, p) for s in range(len(world.SENTENCES)) for p in range(2)]
    return [world.caption(scene, *wording) for scene in scenes for wording in wordings]


def caption_index(scenes: world.Scenes, wording: torch.Tensor) -> torch.Tensor:
    """Return the position of each scene's caption in `all_captions`, (B,).

    wording: (B,) in [0, 2 * number of sentences).
    """
    index = torch.zeros_like(wording)
    for key, count in world.NUM_VALUES.items():
        index = index * count + scenes[key]
    return index * 2 * len(world.SENTENCES) + wording


def build_clip_tokenizer() -> CLIPTokenizer:
    """Return OpenAI's CLIP tokenizer, reduced to tokens of this world's captions and single bytes.

    Ids keep the order of the full vocabulary: the end of text is the highest, as open_clip expects.
    """
    full = open_clip.SimpleTokenizer()
    parts_of = {"".join(pair): pair for pair in full.bpe_ranks}
    wanted = {full.decoder[i] for i in full(all_captions()).unique().tolist()}
    start, end = "<start_of_text>", "<end_of_text>"
    kept = {token for token in full.encoder if len(token.removesuffix("</w>")) == 1} | {start, end}
    while wanted:
        token = wanted.pop()
        if token not in kept:
            kept.add(token)
            wanted |= set(parts_of[token])
    vocab = {token: i for i, token in enumerate(sorted(kept, key=full.encoder.get))}
    merges = [pair for pair in full.bpe_ranks if "".join(pair) in kept]
    special = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS, **special)


def build_clip(tokenizer: CLIPTokenizer) -> open_clip.CLIP:
    """Return an untrained open_clip model of single frames and captions."""
    return open_clip.CLIP(**clip_config(tokenizer))


def clip_config(tokenizer: CLIPTokenizer) -> dict:
    """Return open_clip's model_cfg; `hf_tokenizer_name` is the tokenizer beside the weights."""
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "layers": 4, "width": 128, "patch_size": 8, "head_width": 32},
        "text_cfg": {
            "context_length": MAX_TOKENS,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": ".",
            "width": 64,
            "heads": 4,
            "layers": 2,
        },
    }


def save_clip(model: open_clip.CLIP, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write open_clip's folder layout (`local-dir:`) with float16 safetensors."""
    mean_std = {"mean": CLIP_MEAN, "std": CLIP_STD}
    config = {"model_cfg": clip_config(tokenizer), "preprocess_cfg": mean_std}
    write_json(folder / "open_clip_config.json", config)
    tokenizer.save_pretrained(folder)
    save_half(model, folder / "open_clip_model.safetensors")


def save_half(model: torch.nn.Module, path: Path) -> None:
    """Write the weights as float16 safetensors."""
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, path)
