"""One line from a name, a path or a hub id to a pipeline: `load_pipeline("nano")`.

A checkpoint is a folder per component, in diffusers layout. The components and their classes are always the same, so
they are read one by one and the index is not asked: some indexes name a module that is not in diffusers.
"""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from rlhf.contentv.pipeline import SAMPLING_FILE, ContentVPipeline, SamplingDefaults
from rlhf.contentv.transformer import SD3Transformer3DModel

NANO_PATH = Path(__file__).parents[1] / "nano" / "weights" / "contentv-nano"
CONTENTV_8B = "ByteDance/ContentV-8B"
HUB_ID = re.compile(r"[\w-]+/[\w.-]+")
BF16_ABOVE_BYTES = 2 * 2**30  # of transformer weights on disk
TEXT_ENCODERS = {
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
TOKENIZERS = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer, "tokenizer_3": T5TokenizerFast}
CONFIG_FILES = {
    "transformer": "config.json",
    "vae": "config.json",
    "scheduler": "scheduler_config.json",
    **dict.fromkeys(TEXT_ENCODERS, "config.json"),
    **dict.fromkeys(TOKENIZERS, "tokenizer_config.json"),
}
CONFIGURED = {
    "transformer": SD3Transformer3DModel,
    "vae": AutoencoderKLWan,
    "scheduler": FlowMatchEulerDiscreteScheduler,
}


def load_pipeline(
    model: str | Path = "nano", dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> ContentVPipeline:
    """The pipeline of a model: frozen, in evaluation mode, with `pipe.sampling` as the checkpoint recommends.

    Args:
        model: "nano", a folder, or a hub id, which is downloaded unless it is in the cache.
        dtype: of the transformer and the text encoders; the VAE is always float32. By default float32 for small models
            (whatever the files hold) and bfloat16 for those of more than 2 GiB.
        device: where to put it; the CPU by default.

    Raises:
        ValueError: the model is not there, or lacks a component.
    """
    folder = model_folder(model)
    dtype = dtype or _default_dtype(folder)
    pipe = ContentVPipeline(
        transformer=load_transformer(folder, dtype),
        vae=_weights(AutoencoderKLWan, folder / "vae", dtype=torch.float32),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        **{name: _weights(cls, folder / name, dtype=dtype) for name, cls in TEXT_ENCODERS.items()},
        **{name: cls.from_pretrained(folder / name) for name, cls in TOKENIZERS.items()},
    )
    pipe.sampling = SamplingDefaults.load(folder)
    return pipe if device is None else pipe.to(device)


def load_transformer(folder: Path, dtype: torch.dtype | None = None) -> SD3Transformer3DModel:
    """The transformer of a checkpoint alone, on the CPU, as `load_pipeline` would have it."""
    dtype = dtype or _default_dtype(folder)
    return _weights(SD3Transformer3DModel, folder / "transformer", dtype=dtype)


def resolve_model(model: str | Path) -> Path | str:
    """The folder of "nano" or of a local checkpoint, or the hub id unchanged. Reads no weights and asks no network."""
    if str(model) == "nano":
        return _check_folder(NANO_PATH, "run `python -m rlhf.nano.pretrain` to train it, or clone the repository again")
    path = Path(model).expanduser()
    if path.is_dir():
        return _check_folder(path, "pass the folder that holds model_index.json")
    if HUB_ID.fullmatch(str(model)) and not path.parent.is_dir():
        return str(model)
    raise ValueError(
        f"model={str(model)!r} is no folder here, expected nano, the folder of a checkpoint in diffusers layout, or a "
        f"hub id such as {CONTENTV_8B}; correct the name or the path"
    )


def model_config(model: str | Path) -> dict[str, dict[str, Any]]:
    """Sizes of a model without its weights: {"transformer", "vae", "scheduler", "sampling"}, each a plain dict.

    ContentV-8B's sizes are known here and need neither files nor network; other hub ids fetch their config files.
    """
    if str(model) == CONTENTV_8B:
        return {name: _init_defaults(cls) for name, cls in CONFIGURED.items()} | {"sampling": vars(SamplingDefaults())}
    files = [f"{name}/{CONFIG_FILES[name]}" for name in CONFIGURED] + [SAMPLING_FILE]
    folder = model_folder(model, files)
    configs = {name: json.loads((folder / name / CONFIG_FILES[name]).read_text()) for name in CONFIGURED}
    filled = {name: _filled(cls, configs[name]) for name, cls in CONFIGURED.items()}
    return filled | {"sampling": vars(SamplingDefaults.load(folder))}


def _check_folder(folder: Path, cure: str) -> Path:
    files = ["model_index.json", *(f"{name}/{file}" for name, file in CONFIG_FILES.items())]
    missing = [file for file in files if not (folder / file).is_file()]
    if not missing:
        return folder
    if (folder / "adapter").is_dir():
        cure = f"this is a run directory: `python -m rlhf.export {folder} --merged OUT` makes a checkpoint of it"
    more = f" and {len(missing) - 1} files more" if len(missing) > 1 else ""
    raise ValueError(
        f"{folder} lacks {missing[0]}{more}, expected a checkpoint in diffusers layout with a folder for each of "
        f"{', '.join(CONFIG_FILES)}; {cure}"
    )


def model_folder(model: str | Path, files: list[str] | None = None) -> Path:
    """The local folder of a model; a hub id is downloaded, all of the pipeline or only the files named."""
    model = resolve_model(model)
    if isinstance(model, Path):
        return model
    wanted = files or [f"{name}/*" for name in CONFIG_FILES] + ["model_index.json", SAMPLING_FILE]
    try:
        folder = Path(snapshot_download(model, allow_patterns=wanted, etag_timeout=5))
    except Exception as error:  # offline, unknown, gated and broken connections all have types of their own
        raise ValueError(
            f"model={model!r} is no folder here and not in the Hugging Face cache, and downloading it failed "
            f"({_one_line(error)}); correct the name, download it where there is a "
            "network and pass the folder, or use --model nano"
        ) from error
    return folder if files else _check_folder(folder, "pass the id of a ContentV checkpoint")


def _weights(cls, folder: Path, **kwargs) -> torch.nn.Module:
    """A component, frozen; every weight must come from the checkpoint (the libraries would only warn)."""
    try:
        module, report = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **kwargs)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder} holds no readable safetensors weights ({_one_line(error)}); check that the download is complete"
        ) from error
    unexpected = report["unexpected_keys"] if folder.name in CONFIGURED else []  # text encoders carry spare ones
    if wrong := sorted({*report["missing_keys"], *unexpected}):
        raise ValueError(
            f"the weights in {folder} do not fit {cls.__name__}: {len(wrong)} keys are missing or unexpected, the "
            f"first is {wrong[0]}; check that the download is complete and its config.json belongs to it"
        )
    return module.eval().requires_grad_(False)


def _default_dtype(folder: Path) -> torch.dtype:
    size = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
    return torch.bfloat16 if size > BF16_ABOVE_BYTES else torch.float32


def _init_defaults(cls) -> dict[str, Any]:
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _filled(cls, config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a class as a config file sets them; keys of other classes are left out."""
    return {key: config.get(key, default) for key, default in _init_defaults(cls).items()}


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
