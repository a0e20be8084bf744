"""Memory of the text encoders, which are on the device until the run's prompts are encoded."""

import torch

from rlhf.generator.files import family_of, model_folder
from rlhf.generator.text import ENCODE_BATCH
from rlhf.io import read_object
from rlhf.planner.traced import trace_call


def encoder_configs(model: str) -> dict[str, dict]:
    """Return the configurations of a model's text encoders. ValueError if a file is absent."""
    family = family_of(model)
    if model in family.published:
        return family.text_encoders
    files = {name: f"{name}/{family.config_files[name]}" for name in family.text_encoders}
    folder = model_folder(model, list(files.values()))
    return {name: read_object(folder / file) for name, file in files.items()}


def encoding_bytes(
    classes: dict[str, type],
    configs: dict[str, dict],
    tokens: dict[str, int],
    dtype: torch.dtype,
    batch: int = ENCODE_BATCH,
) -> int:
    """Return the bytes of all weights, plus the largest peak of encoding one batch of prompts.

    classes: encoder classes, by name. tokens: prompt length, by encoder name. batch: number of
    prompts; with 0, only the weights are counted.
    """
    weight_bytes, peak_bytes = 0, 0
    for name, config in configs.items():
        cls = classes[name]
        with torch.device("meta"):
            model = cls(cls.config_class.from_dict(config)).to(dtype).requires_grad_(False).eval()
            ids = torch.empty(batch, tokens[name], dtype=torch.long)
        weight_bytes += sum(p.nbytes for p in model.parameters())
        if not batch:
            continue
        call = trace_call(lambda x, model=model: model(x)[0], ids, model, with_gradient=False)
        peak_bytes = max(peak_bytes, call.no_grad.added_bytes)
    return weight_bytes + peak_bytes
