"""Load a pipeline by a name, a path or a hub id: `load_pipeline("nano")`.

A checkpoint has a folder per component, in diffusers layout. The classes of the components are
fixed, so model_index.json is not read: some name a module that is not in diffusers.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from rlhf.contentv.files import SamplingDefaults, model_folder, one_line
from rlhf.contentv.pipeline import ContentVPipeline
from rlhf.contentv.transformer import SD3Transformer3DModel

BF16_ABOVE_BYTES = 2 * 2**30  # of transformer weights on disk
TEXT_ENCODERS = {
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
TOKENIZERS = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer, "tokenizer_3": T5TokenizerFast}


def load_pipeline(
    model: str | Path = "nano", dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> ContentVPipeline:
    """Return a model's pipeline, frozen and in evaluation mode.

    `pipe.sampling` has the checkpoint's sampling defaults.

    Args:
        model: "nano", a folder, or a hub id, which is downloaded unless it is in the cache.
        dtype: of the transformer and the text encoders; the VAE is always float32. Default:
            bfloat16 for transformers of more than 2 GiB, else float32, for any dtype in the files.
        device: default: the CPU.

    Raises:
        ValueError: the model does not exist, lacks a component, or has other weights.
    """
    folder = model_folder(model)
    dtype = dtype or default_dtype(folder)
    pipe = ContentVPipeline(
        transformer=load_transformer(folder, dtype),
        vae=_load_weights(AutoencoderKLWan, folder / "vae", dtype=torch.float32),
        scheduler=_load_config(FlowMatchEulerDiscreteScheduler, folder / "scheduler"),
        **{name: _load_weights(cls, folder / name, dtype=dtype) for name, cls in TEXT_ENCODERS.items()},
        **{name: _load_config(cls, folder / name) for name, cls in TOKENIZERS.items()},
    )
    pipe.sampling = SamplingDefaults.load(folder)
    return pipe if device is None else pipe.to(device)


def load_transformer(folder: Path, dtype: torch.dtype | None = None) -> SD3Transformer3DModel:
    """Return only the transformer of a checkpoint, as `load_pipeline` does, on the CPU."""
    dtype = dtype or default_dtype(folder)
    return _load_weights(SD3Transformer3DModel, folder / "transformer", dtype=dtype)


def _load_weights(cls, folder: Path, **kwargs) -> torch.nn.Module:
    """Return a frozen component; raise ValueError if weights are missing (libraries only warn)."""
    try:
        module, report = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **kwargs)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder} holds no readable safetensors weights ({one_line(error)}); check that the download is complete"
        ) from error
    unexpected = [] if folder.name in TEXT_ENCODERS else report["unexpected_keys"]  # text encoders carry spare ones
    if wrong := sorted({*report["missing_keys"], *unexpected}):
        raise ValueError(
            f"the weights in {folder} do not fit {cls.__name__}: {len(wrong)} keys are missing or unexpected, the "
            f"first is {wrong[0]}; check that the download is complete and its config.json belongs to it"
        )
    return module.eval().requires_grad_(False)


def _load_config(cls, folder: Path):
    """Load a scheduler or tokenizer; raise ValueError if its files are not readable."""
    try:
        return cls.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds no readable {cls.__name__} ({one_line(error)}); check that the download is complete"
        ) from error


def default_dtype(folder: Path) -> torch.dtype:
    """Return bfloat16 for large transformers, else float32."""
    size = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
    return torch.bfloat16 if size > BF16_ABOVE_BYTES else torch.float32
