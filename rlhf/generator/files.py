"""Checkpoint layout, sizes and sampling defaults, read without importing torch.

So settings are checked against a model before the seconds that importing its libraries takes.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.generator.registry import (
    DEFAULT_MODEL,
    SAMPLING_FILE,
    LatentSizes,
    ModelFamily,
    SamplingDefaults,
    families,
    family_of_config,
)
from rlhf.io import describe_files, file_errors, read_object

if TYPE_CHECKING:  # importing it takes seconds
    from rlhf.generator.pipeline import VideoPipeline

NANO_PATH = Path(__file__).parents[1] / "nano" / "weights" / "contentv-nano"
DIGESTED = 256  # numbers of a weight in `transformer_digest`
TOP_FILES = ("model_index.json", SAMPLING_FILE)
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
        f"hub id such as {DEFAULT_MODEL}; correct the name or the path"
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
        files = [f"{name}/{families()[0].config_files[name]}" for name in names] + [*TOP_FILES]
        folder = model_folder(model, files)
        family = family_of_folder(folder)
        sampling = SamplingDefaults.load(folder, family.sampling)
        read = {name: read_object(folder / name / family.config_files[name]) for name in names}
        read |= {"": read_object(folder / "model_index.json")} if family.fixed else {}
        _check_fixed(folder, family, read)
        configs = {name: family.sizes[name] | read[name] for name in names}
    named = {"_class_name": family.transformer_classes[0]}
    return configs | {"transformer": configs["transformer"] | named, "sampling": vars(sampling)}


def latent_sizes(card: dict[str, dict[str, Any]]) -> LatentSizes:
    """Return the sizes of latents and text of a model, whose `model_sizes` are given."""
    config, halves_time = card["transformer"], card["vae"]["temperal_downsample"]
    text = [config[key] for key in family_of_config(config).text_widths]
    return LatentSizes(config["in_channels"], len(halves_time), sum(halves_time), *(*text, 0)[:2])


def transformer_digest(model: str | Path, pipe: "VideoPipeline | None" = None) -> str:
    """Return a SHA-256 of a model's transformer, which tells bases apart within seconds.

    It covers name, shape and the first 256 numbers, as float32, of every weight. A merged LoRA
    changes it, another number format that holds the same values does not.

    pipe: in place of the model's files. Weights of a hub id are downloaded.
    """
    from safetensors import safe_open  # with torch, which takes seconds to import

    digest, starts = hashlib.sha256(), {}
    if pipe is not None:
        starts = {name: (x.shape, x.flatten()[:DIGESTED]) for name, x in pipe.transformer.state_dict().items()}
    else:
        for path in sorted((model_folder(model) / "transformer").glob("*.safetensors")):
            with file_errors(path), safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    rows = file.get_slice(name)
                    shape = tuple(rows.get_shape())
                    needed = -(-DIGESTED // max(1, math.prod(shape[1:])))
                    starts[name] = shape, (rows[:needed] if shape else file.get_tensor(name)).flatten()[:DIGESTED]
    for name, (shape, start) in sorted(starts.items()):
        digest.update(f"{name} {tuple(shape)}".encode())
        digest.update(start.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def describe_model(model: str | Path) -> str | None:
    """Return what tells a model's files from those of another version, without reading weights.

    `describe_files` of a folder, the commit of a hub id in the cache; None where there is neither.
    """
    try:
        folder = resolve_model(model)
    except ValueError:
        return None
    if isinstance(folder, Path):
        return describe_files(*(folder / n for n in (*family_of_folder(folder).config_files, *TOP_FILES)))
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(folder, "model_index.json")
    return f"commit {Path(cached).parent.name}" if isinstance(cached, str) else None


def family_of(model: str | Path) -> ModelFamily:
    """Return the family of a model. Raises ValueError as `model_sizes` does."""
    return family_of_config(model_sizes(model)["transformer"])


def family_of_folder(folder: Path) -> ModelFamily:
    """Return the family of a checkpoint; the default one if its transformer's config says none."""
    path = folder / "transformer" / "config.json"
    return family_of_config(read_object(path) if path.is_file() else {})


def _check_fixed(folder: Path, family: ModelFamily, configs: dict[str, dict]) -> None:
    """Raise ValueError for config values other than `family.fixed`, as of image to video."""
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
        return model if files else check_weights(model, "downloading or copying it again")
    names = dict.fromkeys(name for family in families() for name in family.config_files)
    wanted = files or [f"{name}/*" for name in names] + [*TOP_FILES]
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model, allow_patterns=wanted, etag_timeout=5))
    except Exception as error:  # offline, unknown, gated and broken connections each have their type
        got, cure = describe_download(model, error)
        expected = "expected nano, the folder of a checkpoint in diffusers layout, or a hub id"
        raise ValueError(f"model={model!r}: got {got}, {expected}; {cure}") from error
    if files:
        return folder
    return check_weights(_check_folder(folder, "pass the id of a checkpoint"), f"`hf download {model}`")


def describe_download(hub_id: str, error: Exception) -> tuple[str, str]:
    """Return got and cure of a failed download: gated, not found, offline or broken off."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{hub_id}"
        return "a gated repository", f"accept its terms at {page}, then `hf auth login` or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        got = f"no folder here, and no repository of the Hugging Face Hub that may be read ({one_line(error)})"
        return got, "correct the name, or `hf auth login` with a token that may read it"
    if constants.HF_HUB_OFFLINE:
        got = "no folder here, nothing in the Hugging Face cache, and no network by HF_HUB_OFFLINE"
        return got, f"correct the name, or run `hf download {hub_id}` where there is a network"
    got = f"no folder here, nothing in the Hugging Face cache, and a failed download ({one_line(error)})"
    return (
        got,
        f"correct the path, try again, or run `hf download {hub_id}` where there is a network and pass its folder",
    )


def check_weights(folder: Path, cure: str) -> Path:
    """Return the folder of a checkpoint; raise ValueError if weight files of it are missing.

    Of several, all are told before any is read: an interrupted download leaves an index without
    its shards, or links to files that are not there.
    """
    missing = []
    for name in ("transformer", "vae", *family_of_folder(folder).text_encoders):
        shards = set()
        for index in (folder / name).glob("*.safetensors.index.json"):
            with file_errors(index):
                shards |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = shards or {path.name for path in (folder / name).glob("*.safetensors")} or {"*.safetensors"}
        missing += [f"{name}/{file}" for file in sorted(files) if not (folder / name / file).is_file()]
    if missing:
        got = f"{len(missing)} weight files missing, the first {missing[0]}"
        raise ValueError(f"{folder}: got {got}, expected a whole checkpoint; {cure} completes it")
    return folder


def one_line(error: Exception) -> str:
    """Return the type and first line of an error, for another message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
