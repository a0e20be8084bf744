"""Tiny random CLIP models on disk, in the layouts of transformers and open_clip."""

import json

import torch

SIZE = 32  # pixels
CONTEXT = 24  # tokens; each letter is one


def save_transformers_clip(folder, size=SIZE):
    """A CLIPModel with its tokenizer, as `save_pretrained` writes them."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = tower | {"image_size": size, "patch_size": 8}
    tokenizer = letter_tokenizer()
    text = tower | {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    _spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_open_clip(folder, size=SIZE, own_tokenizer=True, preprocess=None):
    """open_clip's "local-dir" layout, with a small vocabulary of its own or the built-in one."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tokenizer = letter_tokenizer()
    text = {"context_length": CONTEXT, "width": 32, "heads": 2, "layers": 2, "vocab_size": 49408}
    if own_tokenizer:
        text |= {"vocab_size": len(tokenizer), "hf_tokenizer_name": "own", "pad_id": 1, "eos_id": 1}
        text |= {"pool_type": "eos"}
    vision = {"image_size": size, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
    config = {
        "model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": preprocess or {},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if own_tokenizer:
        tokenizer.save_pretrained(folder)
    model = open_clip.create_model(f"local-dir:{folder}")
    _spread(model)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def letter_tokenizer():
    from transformers import CLIPTokenizer

    pieces = (
        ["<|startoftext|>", "<|endoftext|>"]
        + [chr(c) for c in range(97, 123)]
        + [f"{chr(c)}</w>" for c in range(97, 123)]
    )
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])


def _spread(model):
    """Larger weights than at initialisation: scores differ visibly between images."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
