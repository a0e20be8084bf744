"""Memory of the text encoders, which are on the device until the run's prompts are encoded."""

import torch

from rlhf.contentv.files import CONFIG_FILES, CONTENTV_8B, model_folder
from rlhf.contentv.loading import TEXT_ENCODERS
from rlhf.contentv.text import ENCODE_BATCH
from rlhf.io import read_object
from rlhf.planner.traced import trace_call

# ContentV-8B has those of Stable Diffusion 3.5: CLIP L/14 (arXiv 2103.00020), OpenCLIP bigG/14
# (arXiv 2212.07143) and the encoder of T5 v1.1 XXL (arXiv 1910.10683). The configuration classes
# supply the other values.
CONTENTV_ENCODERS = {
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
    """Return the configurations of a model's text encoders. ValueError if a file is absent."""
    if model == CONTENTV_8B:
        return CONTENTV_ENCODERS
    files = {name: f"{name}/{CONFIG_FILES[name]}" for name in TEXT_ENCODERS}
    folder = model_folder(model, list(files.values()))
    return {name: read_object(folder / file) for name, file in files.items()}


def encoding_bytes(
    configs: dict[str, dict], tokens: dict[str, int], dtype: torch.dtype, batch: int = ENCODE_BATCH
) -> int:
    """Return the bytes of all weights, and of one batch of prompts in the encoder that takes most.

    tokens: length of a prompt, by encoder. batch: prompts; 0 counts the weights alone.
    """
    weight_bytes, peak_bytes = 0, 0
    for name, config in configs.items():
        cls = TEXT_ENCODERS[name]
        with torch.device("meta"):
            model = cls(cls.config_class.from_dict(config)).to(dtype).requires_grad_(False).eval()
            ids = torch.empty(batch, tokens[name], dtype=torch.long)
        weight_bytes += sum(p.nbytes for p in model.parameters())
        if not batch:
            continue
        call = trace_call(lambda x, model=model: model(x)[0], ids, model, with_gradient=False)
        peak_bytes = max(peak_bytes, call.no_grad.added_bytes)
    return weight_bytes + peak_bytes
