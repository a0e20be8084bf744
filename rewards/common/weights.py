"""Load the weights of frozen models without running code from files; errors say what is missing."""

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from rewards.catalogue import WEIGHTS
from rewards.contract import RewardError


class Frozen(torch.nn.Module):
    """A module that stays in evaluation mode. Call `freeze` at the end of __init__."""

    def freeze(self) -> "Frozen":
        """Disable gradients of parameters, set evaluation mode and return self."""
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Frozen":
        """Stay in evaluation mode and return self."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device


def torch_dtype(name: str, dtype: str) -> torch.dtype:
    """Return the torch.dtype of a reward's dtype setting. Raises RewardError for any other name."""
    choices = ("float32", "bfloat16", "float16", "float64")
    if dtype not in choices:
        raise RewardError(name, got=f"dtype={dtype!r}", expected=f"one of {', '.join(choices)}", cure="correct dtype")
    return getattr(torch, dtype)


def missing_weights_error(
    name: str, repository: str, key: str, error: Exception, file: str | None = None, tokenizer: bool = False
) -> RewardError:
    """Return the error for weights that are neither cached nor downloadable.

    It names size, licence and the setting `key` that takes a local path. tokenizer: only the
    tokenizer is missing.
    """
    size, licence = WEIGHTS.get(repository, ("size unknown", "licence: see its model card"))
    if tokenizer and "tokenizer" not in size:
        size = "the tokenizer, under 20 MB"
    reason, remedy = _hub_refusal(repository, error)
    if "gated" in licence and reason is None:  # offline: going online alone would not do
        remedy = f"accept its terms at https://huggingface.co/{repository}, `hf auth login` and go online once"
    reason = (reason or str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    what = f"{repository}, {file}" if file else repository
    return RewardError(
        name,
        got=f"no {'tokenizer of' if tokenizer else 'weights for'} {repository!r} ({reason})",
        expected=f"{'it' if tokenizer else 'them'} in the local cache, or a download ({what}: {size}, {licence})",
        cure=f"{remedy}, or set `{key}` in reward_kwargs.{name} to a local path",
    )


def _hub_refusal(repository: str, error: Exception) -> tuple[str | None, str]:
    """Return why the hub refuses a repository (None for any other error), and the cure."""
    from huggingface_hub import errors

    while error is not None and not isinstance(error, errors.RepositoryNotFoundError):
        error = error.__cause__ or error.__context__  # transformers wraps it
    if error is None:
        return None, "go online once"
    if isinstance(error, errors.GatedRepoError):
        remedy = f"accept its terms at https://huggingface.co/{repository} and log in (`hf auth login`)"
        return "the hub wants its terms accepted first: it is gated", remedy
    return "the hub has none of this name, or a private one", "correct the name, log in (`hf auth login`)"


@contextmanager
def offline_if_unreachable(local: bool = False) -> Iterator[None]:
    """Go offline while inside if the hub can't be reached, whose client would retry for a minute.

    local: nothing inside needs the hub, so its reachability is not tested.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or local or not _is_reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@lru_cache
def _is_reachable(endpoint: str) -> bool:
    """Return whether the server answers within five seconds; the result is cached."""
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=5)
    except Exception:  # each client has its own errors for a missing network
        return False
    return True


def from_pretrained(name: str, cls: type, model: str, key: str = "model", **kwargs) -> Any:
    """Return cls.from_pretrained(model). Raises RewardError that names the setting `key`."""
    path = str(Path(model).expanduser()) if model.startswith("~") else model
    try:
        with offline_if_unreachable(local=Path(path).is_dir()):
            return cls.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        raise missing_weights_error(name, model, key, error, tokenizer=cls.__name__ == "AutoTokenizer") from error


def load_pretrained(name: str, cls: type, model: str, **kwargs) -> torch.nn.Module:
    """Load a transformers model in float32. Raises RewardError if the checkpoint lacks weights."""
    kwargs = {"dtype": torch.float32, "output_loading_info": True} | kwargs
    loaded, report = from_pretrained(name, cls, model, **kwargs)
    if report["missing_keys"]:  # transformers would initialize these at random
        absent = sorted(report["missing_keys"])
        got = f"weights in {model!r} without {absent[0]} and {len(absent) - 1} more"
        expected, cure = f"a complete {cls.__name__}", "choose a checkpoint of the whole model"
        raise RewardError(name, got=got, expected=expected, cure=cure)
    return loaded


def load_tokenizer(name: str, tokenizer: Any, key: str = "tokenizer") -> Any:
    """Load a transformers tokenizer from hub or folder; return a tokenizer object unchanged."""
    from transformers import AutoTokenizer

    return from_pretrained(name, AutoTokenizer, tokenizer, key) if isinstance(tokenizer, str) else tokenizer


def load_from_torch_hub(name: str, url: str, key: str) -> dict[str, torch.Tensor]:
    """Load or download a torchvision state dict. Raises RewardError that names setting `key`."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    try:
        if not cached.is_file() and not _is_reachable(url.rsplit("/", 1)[0]):
            raise OSError("its server does not answer")
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no connection, or a wrong checksum
        raise missing_weights_error(name, url, key, error) from error


def load_state_dict(name: str, path: str | Path, pickle_cure: str | None = None) -> dict[str, torch.Tensor]:
    """Load a state dict from a .safetensors file, or from a torch file of plain tensors.

    Raises RewardError; `pickle_cure` is the cure in its message if the file is a pickled module.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise RewardError(name, got=f"no file at {path}", expected="a weights file", cure="correct the path")
    try:
        state = _read_tensors(path)
    except Exception as error:  # KeyError, EOFError, RuntimeError or UnpicklingError
        expected = "a state dict (safetensors, or torch.save of module.state_dict())"
        if "Unsupported global" not in str(error):
            reason = f"{type(error).__name__} on reading {path}"
            raise RewardError(name, got=reason, expected=expected, cure="download the file again") from error
        cure = f"loading it would run code from the file; {pickle_cure or 'convert it where that can do no harm'}"
        got = f"{path}, a pickled module, not plain tensors"
        raise RewardError(name, got=got, expected=expected, cure=cure) from error
    if not isinstance(state, dict):
        got, expected = f"{path} with a {type(state).__name__} in it", "a state dict: tensors by name"
        raise RewardError(name, got=got, expected=expected, cure="use the published file of this model")
    return state


def require_tensor(name: str, state: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """Return one tensor of a checkpoint. Raises RewardError if there is none of that name."""
    if not isinstance(state.get(key), torch.Tensor):
        got = f"a checkpoint without {key} (its names: {', '.join([*state][:3])}, ...)"
        cure = "use the published file of this model"
        raise RewardError(name, got=got, expected=f"the tensor {key}", cure=cure)
    return state[key]


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a .safetensors or torch file on the CPU, mapped where possible."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    in_place = zipfile.is_zipfile(path)  # files of PyTorch before 1.6 cannot be mapped
    return torch.load(path, map_location="cpu", weights_only=True, mmap=in_place)


def hub_file(name: str, repository: str, file: str, key: str) -> str:
    """Return the path of a hub file. Raises RewardError that names the setting `key`."""
    from huggingface_hub import hf_hub_download

    try:
        with offline_if_unreachable():
            return hf_hub_download(repository, file)
    except Exception as error:  # offline, gated and broken connections have different types
        raise missing_weights_error(name, repository, key, error, file) from error


def load_published_weights(
    name: str, path: str | None, repository: str, file: str, pickle_cure: str | None = None
) -> dict:
    """Load the state dict at `path`, or for None the published `file` of the hub `repository`.

    The file is downloaded if it is not cached. Raises RewardError; pickle_cure as in
    `load_state_dict`.
    """
    return load_state_dict(name, path or hub_file(name, repository, file, "checkpoint"), pickle_cure)


def build_from_state_dict(name: str, source: str, build: Callable[[], torch.nn.Module], state: dict) -> torch.nn.Module:
    """Return build() with the tensors of `state` as parameters, without initialisation or copies.

    Raises RewardError unless keys and shapes agree exactly; `source` names the file in its message.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        module = build()
    wanted, found = shapes(module.state_dict()), shapes(state)
    wrong = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if wrong:
        got = f"{source}, where {wrong[0]} is {found.get(wrong[0], 'missing')}; {len(wrong)} such keys in all"
        expected = f"{wrong[0]}: {wanted.get(wrong[0], 'no such key')}"
        raise RewardError(name, got=got, expected=expected, cure="use the published file of this model")
    module.load_state_dict(state, assign=True)
    return module


def shapes(state: dict) -> dict[str, tuple[int, ...] | str]:
    """Return the shape of each tensor by key; the type's name for other values."""
    return {key: tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__ for key, x in state.items()}


def rename_keys(state: dict, names: dict[str, str], unused: tuple[str, ...]) -> dict:
    """Return a state dict with parts of its keys replaced, in the order of `names`.

    Keys that contain a text of `unused` are dropped.
    """
    kept = {key: key for key in state if not any(part in key for part in unused)}
    for old, new in names.items():
        kept = {key: name.replace(old, new) for key, name in kept.items()}
    return {name: state[key] for key, name in kept.items()}
