"""The text encoders, which are on the device until the prompts of the run are encoded: what they need there."""

import torch

from rlhf.contentv.files import CONFIG_FILES, CONTENTV_8B, model_folder
from rlhf.contentv.loading import TEXT_ENCODERS
from rlhf.io import read_object
from rlhf.parts import trace_part
from rlhf.text import ENCODE_BATCH

# ContentV-8B's, which are Stable Diffusion 3.5's: CLIP L/14 (arXiv 2103.00020), OpenCLIP bigG/14 (arXiv 2212.07143) and
# the encoder of T5 v1.1 XXL (arXiv 1910.10683). What is left out is as in the configuration's class.
PUBLISHED = {
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
    },
    "text_encoder_3": {
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
}


def encoder_configs(model: str) -> dict[str, dict]:
    """Configurations of a model's text encoders, by its files; ContentV-8B's without a file. ValueError if absent."""
    if model == CONTENTV_8B:
        return PUBLISHED
    files = {name: f"{name}/{CONFIG_FILES[name]}" for name in TEXT_ENCODERS}
    folder = model_folder(model, list(files.values()))
    return {name: read_object(folder / file) for name, file in files.items()}


def encoding_bytes(configs: dict[str, dict], tokens: dict[str, int], dtype: torch.dtype) -> int:
    """Bytes of all weights, and of what the encoder that takes most computes for a batch of prompts.

    tokens: of a prompt, by encoder.
    """
    weights, most = 0, 0
    for name, config in configs.items():
        cls = TEXT_ENCODERS[name]
        with torch.device("meta"):
            model = cls(cls.config_class.from_dict(config)).to(dtype).requires_grad_(False).eval()
            ids = torch.empty(ENCODE_BATCH, tokens[name], dtype=torch.long)
        weights += sum(p.nbytes for p in model.parameters())
        part = trace_part(lambda x, model=model: model(x)[0], ids, False, model)
        most = max(most, part.sampling.most - part.sampling.start)
    return weights + most
