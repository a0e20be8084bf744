"""Checkpoint layout, sizes and sampling defaults, read without importing torch.

So settings are checked against a model before the seconds that importing its libraries takes.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.generator.registry import (
    CONTENTV_8B,
    SAMPLING_FILE,
    ModelFamily,
    SamplingDefaults,
    families,
    family_of_config,
)
from rlhf.io import read_object

if TYPE_CHECKING:  # importing it takes seconds
    from rlhf.generator.pipeline import VideoPipeline

NANO_PATH = Path(__file__).parents[1] / "nano" / "weights" / "contentv-nano"
HUB_ID = re.compile(r"[\w-]+/[\w.-]+")


def resolve_model(model: str | Path) -> Path | str:
    """Return the folder of "nano" or of a local checkpoint, or a hub id unchanged.

    Neither weights nor the network are read. Raises ValueError for anything else.
    """
    if str(model) == "nano":
        return _check_folder(NANO_PATH, "clone the repository again, or train it by `python bench/nano/pretrain.py`")
    path = Path(model).expanduser()
    if path.is_dir():
        return _check_folder(path, "pass the folder that holds model_index.json")
    if HUB_ID.fullmatch(str(model)) and not path.parent.is_dir():
        return str(model)
    raise ValueError(
        f"model={str(model)!r} is no folder here, expected nano, the folder of a checkpoint in diffusers layout, or a "
        f"hub id such as {CONTENTV_8B}; correct the name or the path"
    )


def model_sizes(model: str | Path, pipe: "VideoPipeline | None" = None) -> dict[str, dict[str, Any]]:
    """Return the sizes of a pipeline, else those in the named model's config files.

    The keys are "transformer", "vae", "tokenizer" and "sampling"; the values are dicts. The
    transformer's `_class_name` is that of its family. Sizes of published models are known here and
    need neither files nor network. The config files of other hub ids are downloaded. Raises
    ValueError for another model than the family's, such as one of images to video.
    """
    if pipe is not None:
        family, sampling = pipe.family, pipe.sampling
        configs = {"transformer": dict(pipe.transformer.config), "vae": dict(pipe.vae.config)}
        configs |= {"tokenizer": {"model_max_length": pipe.tokenizer_max_length}}
    elif published := next((f for f in families() if str(model) in f.published), None):
        family, sampling, configs = published, published.sampling, published.published[str(model)]
    else:
        names = ("transformer", "vae", "tokenizer")
        files = [f"{name}/{families()[0].config_files[name]}" for name in names] + ["model_index.json", SAMPLING_FILE]
        folder = model_folder(model, files)
        family = family_of_folder(folder)
        sampling = SamplingDefaults.load(folder, family.sampling)
        read = {name: read_object(folder / name / family.config_files[name]) for name in names}
        read |= {"": read_object(folder / "model_index.json")} if family.fixed else {}
        _check_fixed(folder, family, read)
        configs = {name: family.sizes[name] | read[name] for name in names}
    named = {"_class_name": family.transformer_classes[0]}
    return configs | {"transformer": configs["transformer"] | named, "sampling": vars(sampling)}


def family_of(model: str | Path) -> ModelFamily:
    """Return the family of a model. Raises ValueError as `model_sizes` does."""
    return family_of_config(model_sizes(model)["transformer"])


def family_of_folder(folder: Path) -> ModelFamily:
    """Return the family of a checkpoint; the default one if its transformer's config says none."""
    path = folder / "transformer" / "config.json"
    return family_of_config(read_object(path) if path.is_file() else {})


def _check_fixed(folder: Path, family: ModelFamily, configs: dict[str, dict]) -> None:
    """Raise ValueError for a value that another architecture has."""
    for name, fixed in family.fixed.items():
        for key, expected in fixed.items():
            got = configs[name].get(key, expected)
            if (tuple(got) if isinstance(got, list) else got) != expected:
                where = f"{folder / name}: the config" if name else f"{folder / 'model_index.json'}: it"
                raise ValueError(
                    f"{where} has {key}={got!r}, expected {expected!r}: this is no text-to-video model of "
                    f"{family.name}; name one, such as {next(iter(family.published))}"
                )


def _check_folder(folder: Path, cure: str) -> Path:
    """Return the folder; raise ValueError if it lacks a file of a checkpoint."""
    config_files = family_of_folder(folder).config_files
    files = ["model_index.json", *(f"{name}/{file}" for name, file in config_files.items())]
    missing = [file for file in files if not (folder / file).is_file()]
    if not missing:
        return folder
    if (folder / "adapter").is_dir():
        cure = f"this is a run directory: `python -m rlhf.export {folder} --merged OUT` makes a checkpoint of it"
    more = f" and {len(missing) - 1} files more" if len(missing) > 1 else ""
    raise ValueError(
        f"{folder} lacks {missing[0]}{more}, expected a checkpoint in diffusers layout with a folder for each of "
        f"{', '.join(config_files)}; {cure}"
    )


def model_folder(model: str | Path, files: list[str] | None = None) -> Path:
    """Return the local folder of a model; download all of a hub id, or only `files`."""
    model = resolve_model(model)
    if isinstance(model, Path):
        return model
    names = dict.fromkeys(name for family in families() for name in family.config_files)
    wanted = files or [f"{name}/*" for name in names] + ["model_index.json", SAMPLING_FILE]
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model, allow_patterns=wanted, etag_timeout=5))
    except Exception as error:  # offline, unknown, gated and broken connections each have their type
        raise ValueError(
            f"model={model!r} is no folder here and not in the Hugging Face cache, and downloading it failed "
            f"({one_line(error)}); correct the name, download it where there is a "
            "network and pass the folder, or use --model nano"
        ) from error
    return folder if files else _check_folder(folder, "pass the id of a checkpoint")


def one_line(error: Exception) -> str:
    """Return the type and first line of an error, for another message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
