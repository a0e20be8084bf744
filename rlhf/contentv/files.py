"""Checkpoint layout, sizes and sampling defaults, read without importing torch.

So settings are checked against a model before the seconds that importing its libraries takes.
"""

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.io import file_errors, read_object

if TYPE_CHECKING:  # importing it takes seconds
    from rlhf.contentv.pipeline import ContentVPipeline

NANO_PATH = Path(__file__).parents[1] / "nano" / "weights" / "contentv-nano"
CONTENTV_8B = "ByteDance/ContentV-8B"
HUB_ID = re.compile(r"[\w-]+/[\w.-]+")
SAMPLING_FILE = "sampling.json"
CONFIG_FILES = {
    "transformer": "config.json",
    "vae": "config.json",
    "scheduler": "scheduler_config.json",
    **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), "config.json"),
    **dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"), "tokenizer_config.json"),
}
WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
# Sizes of ContentV-8B, which are also the classes' defaults for keys that a config file leaves out.
SIZES = {
    "transformer": {"in_channels": 16, "patch_size": 2, "num_layers": 38},
    "vae": {"temperal_downsample": [False, True, True]},
    "tokenizer": {"model_max_length": 77},  # CLIP's
}


@dataclass(frozen=True)
class SamplingDefaults:
    """The recommended sampling of a checkpoint, from its sampling.json; defaults: ContentV-8B's."""

    height: int = 432  # pixels
    width: int = 768  # pixels
    num_frames: int = 125  # 4k + 1
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    fps: int = 24  # frames per second of the written video
    max_sequence_length: int = 256  # T5 tokens
    negative_prompt: str = ""

    def __post_init__(self):
        if not 1 <= self.fps <= 1000:
            raise ValueError(f"fps: got {self.fps}, expected at least 1 and at most 1000 frames per second; correct it")

    @classmethod
    def load(cls, folder: Path) -> "SamplingDefaults":
        """Read folder/sampling.json; ContentV-8B's values if the file or a key is missing."""
        path = Path(folder) / SAMPLING_FILE
        values = read_object(path) if path.exists() else {}
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{path} has {unknown}, expected only {sorted(known)}; remove or rename these keys")
        return cls(**values)

    def save(self, folder: Path) -> None:
        """Write the file folder/sampling.json."""
        (Path(folder) / SAMPLING_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def call_arguments(self) -> dict[str, Any]:
        """Return the defaults as keyword arguments of `ContentVPipeline.__call__`."""
        return {key: value for key, value in asdict(self).items() if key != "fps"}


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


def model_sizes(model: str | Path, pipe: "ContentVPipeline | None" = None) -> dict[str, dict[str, Any]]:
    """Return the sizes of a pipeline, else those in the named model's config files.

    The keys are "transformer", "vae", "tokenizer" and "sampling"; the values are dicts.
    ContentV-8B's are known here and need neither files nor network. The config files of other hub
    ids are downloaded.
    """
    if pipe is not None:
        parts = {"transformer": dict(pipe.transformer.config), "vae": dict(pipe.vae.config)}
        return parts | {"tokenizer": {"model_max_length": pipe.tokenizer_max_length}, "sampling": vars(pipe.sampling)}
    if str(model) == CONTENTV_8B:
        return SIZES | {"sampling": asdict(SamplingDefaults())}
    folder = model_folder(model, [f"{name}/{CONFIG_FILES[name]}" for name in SIZES] + [SAMPLING_FILE])
    configs = {name: known | read_object(folder / name / CONFIG_FILES[name]) for name, known in SIZES.items()}
    return configs | {"sampling": asdict(SamplingDefaults.load(folder))}


def _check_folder(folder: Path, cure: str) -> Path:
    """Return the folder; raise ValueError if it lacks a file of a checkpoint."""
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
    """Return the local folder of a model; download all of a hub id, or only `files`."""
    model = resolve_model(model)
    if isinstance(model, Path):
        return model if files else check_weights(model, "downloading or copying it again")
    wanted = files or [f"{name}/*" for name in CONFIG_FILES] + ["model_index.json", SAMPLING_FILE]
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model, allow_patterns=wanted, etag_timeout=5))
    except Exception as error:  # offline, unknown, gated and broken connections each have their type
        got, cure = describe_download(model, error)
        expected = "expected nano, the folder of a checkpoint in diffusers layout, or a hub id"
        raise ValueError(f"model={model!r}: got {got}, {expected}; {cure}") from error
    if files:
        return folder
    return check_weights(_check_folder(folder, "pass the id of a ContentV checkpoint"), f"`hf download {model}`")


def describe_download(hub_id: str, error: Exception) -> tuple[str, str]:
    """Return what came of downloading a repository that is not in the cache, and the cure."""
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
    return got, f"try again, or run `hf download {hub_id}` where there is a network and pass its folder"


def check_weights(folder: Path, cure: str) -> Path:
    """Return the folder of a checkpoint; raise ValueError if weight files of it are missing.

    Of several, all are told before any is read: an interrupted download leaves an index without
    its shards, or links to files that are not there.
    """
    missing = []
    for name in WEIGHTS:
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
