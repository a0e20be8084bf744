"""A tiny random Qwen2-VL on disk, with a tokenizer that knows the words of the rewards' texts."""

import re

import torch
import transformers

from rewards.common.qwen_vl import AFTER, BEFORE

WIDTH = 32
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
# The chat template of Qwen/Qwen2-VL-2B-Instruct, without its counting of images.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_for(*texts):
    """One token a word; newlines are tokens too."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in texts for word in re.findall(r"\n| +|[^\s]+", text)})
    vocabulary = {word: i for i, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| +|[^\s]+"), behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", unk_token="<unk>")
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_base(folder, text):
    """config.json and tokenizer, as a Qwen2-VL has them on the hub; no weights."""
    tokenizer = tokenizer_for(BEFORE, AFTER, text)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    sizes(ids, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sizes(ids, vocabulary):
    from transformers import Qwen2VLConfig

    return Qwen2VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-6,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def random_model(folder, tokens):
    """Qwen2VLForConditionalGeneration with room for the reward tokens, and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer, Qwen2VLForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(tokens, special_tokens=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(AutoConfig.from_pretrained(folder))
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for parameter in model.parameters():  # the initialisation is so small that every image would score alike
            parameter.data = torch.randn(parameter.shape) * (0.2 if parameter.ndim > 1 else 0.3) + (parameter.ndim == 1)
    return model.eval().requires_grad_(False), tokenizer


def name_in_445(key):
    """Of a weight, in transformers 4.45: the published files have these names."""
    return key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def hidden_states(model, tokenizer, media, pixels, grid, texts):
    """(N, L, D) and token ids by transformers' chat template, placeholders, padding and mask.

    media: "image" or "video"; pixels, grid: from its processor. Positions 0, 1, .. on all axes.
    """
    chats = [[{"role": "user", "content": [{"type": media}, {"type": "text", "text": text}]}] for text in texts]
    each = int(grid[0].prod()) // model.config.vision_config.spatial_merge_size**2
    written = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).replace(
            f"<|{media}_pad|>", f"<|{media}_pad|>" * each
        )
        for chat in chats
    ]
    tokens = tokenizer(written, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False)
    positions = torch.arange(tokens.input_ids.shape[1]).expand(3, *tokens.input_ids.shape)
    inputs = {"pixel_values" if media == "image" else "pixel_values_videos": pixels, f"{media}_grid_thw": grid}
    inputs |= {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, "position_ids": positions}
    return model.model(**inputs).last_hidden_state, tokens.input_ids


def in_float64(monkeypatch):
    """Keep float64 where transformers computes in float32, which would hide a difference."""
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def rotate(q, k, cos, sin):
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return tuple(x * cos + qwen.rotate_half(x) * sin for x in (q, k))

    monkeypatch.setattr(qwen.Qwen2VLRMSNorm, "forward", norm)
    monkeypatch.setattr(qwen, "apply_rotary_pos_emb_vision", rotate)


JUDGED = "Is this {prompt} a red fox rain bird ? Answer with Yes or No. 7 Grade by number. system You are helpful "
JUDGED += "assistant. user assistant <0.1 seconds>"
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 1, "eos_token_id": None, "bos_token_id": None, "head_dim": 16}
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
VISION = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32}
FAMILIES = {
    "Qwen2VL": {},
    "Qwen2_5_VL": {"vision_config": VISION | {"fullatt_block_indexes": [1], "window_size": 56}},
    "Qwen3VL": {"vision_config": VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}},
}


def judge_model(family, dtype=torch.float32):
    """A whole model with random weights and its processor, for questions of the words in JUDGED."""
    tokenizer = tokenizer_for(JUDGED)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    config = sizes(ids, len(tokenizer))
    if family != "Qwen2VL":
        places = {f"{name}_token_id": ids[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
        places |= {f"{name}_token_id": ids[f"<|{name}_pad|>"] for name in ("image", "video")}
        text = TEXT | {"vocab_size": len(tokenizer), "rope_parameters": ROPE}
        config = getattr(transformers, f"{family}Config")(text_config=text, **FAMILIES[family], **places)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape) * (0.2 if parameter.ndim > 1 else 0.3) + (parameter.ndim == 1)
    video = transformers.Qwen3VLVideoProcessor if family == "Qwen3VL" else transformers.Qwen2VLVideoProcessor
    parts = transformers.Qwen2VLImageProcessor(), tokenizer, video(size={"shortest_edge": 1024, "longest_edge": 10**6})
    processor = getattr(transformers, f"{family}Processor")(*parts, chat_template=tokenizer.chat_template)
    return model.to(dtype).eval(), processor
