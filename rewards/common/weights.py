"""Weights of frozen models: loading without running code from a file, and saying what is missing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from rewards.catalogue import WEIGHTS
from rewards.contract import RewardError


class Frozen(torch.nn.Module):
    """A module that never trains: evaluation mode for good. Call `freeze` at the end of __init__."""

    def freeze(self) -> "Frozen":
        """Itself, without trained parameters and in evaluation mode."""
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Frozen":
        """Itself, in evaluation mode whatever is asked for."""
        return super().train(False)


def torch_dtype(name: str, dtype: str) -> torch.dtype:
    """The number format that a reward's setting names."""
    choices = ("float32", "bfloat16", "float16", "float64")
    if dtype not in choices:
        raise RewardError(name, got=f"dtype={dtype!r}", expected=f"one of {', '.join(choices)}", cure="correct dtype")
    return getattr(torch, dtype)


def missing_weights(
    name: str, repository: str, key: str, error: Exception, file: str | None = None, tokenizer: bool = False
) -> RewardError:
    """The error for weights that are neither on disk nor to be had: what they are, and the key that takes a path.

    tokenizer: it alone is missing, which is small.
    """
    size, licence = WEIGHTS.get(repository, ("size unknown", "licence: see its model card"))
    if tokenizer and "tokenizer" not in size:
        size = "the tokenizer, under 20 MB"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    what = f"{repository}, {file}" if file else repository
    return RewardError(
        name,
        got=f"no {'tokenizer of' if tokenizer else 'weights for'} {repository!r} ({reason})",
        expected=f"{'it' if tokenizer else 'them'} in the local cache, or a download ({what}: {size}, {licence})",
        cure=f"go online once, or set `{key}` in reward_kwargs.{name} to a local path",
    )


@contextmanager
def quick_hub(local: bool = False) -> Iterator[None]:
    """Loading from the hub inside fails at once if the hub can't be reached; its own client would try for a minute.

    local: nothing inside needs the hub, so it is not asked at all.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or local or not _hub_answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@lru_cache
def _hub_answers(endpoint: str) -> bool:
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=5)
    except Exception:  # whichever way the client puts "no network"
        return False
    return True


def from_pretrained(name: str, cls: type, model: str, key: str = "model", **kwargs) -> Any:
    """cls.from_pretrained of transformers, from hub or folder; RewardError, naming `key`, where it is in neither."""
    path = str(Path(model).expanduser()) if model.startswith("~") else model
    try:
        with quick_hub(local=Path(path).is_dir()):
            return cls.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        raise missing_weights(name, model, key, error, tokenizer=cls.__name__ == "AutoTokenizer") from error


def load_pretrained(name: str, cls: type, model: str, **kwargs) -> torch.nn.Module:
    """A model of transformers with every weight from the checkpoint, in float32; RewardError if some are missing."""
    kwargs = {"dtype": torch.float32, "output_loading_info": True} | kwargs
    loaded, report = from_pretrained(name, cls, model, **kwargs)
    if report["missing_keys"]:  # transformers would leave these at random
        absent = sorted(report["missing_keys"])
        got = f"weights in {model!r} without {absent[0]} and {len(absent) - 1} more"
        expected, cure = f"a complete {cls.__name__}", "choose a checkpoint of the whole model"
        raise RewardError(name, got=got, expected=expected, cure=cure)
    return loaded


def load_tokenizer(name: str, tokenizer: Any, key: str = "tokenizer") -> Any:
    """A tokenizer of transformers from hub or folder; one that is made already is taken as it is."""
    from transformers import AutoTokenizer

    return from_pretrained(name, AutoTokenizer, tokenizer, key) if isinstance(tokenizer, str) else tokenizer


def load_from_torch_hub(name: str, url: str, key: str) -> dict[str, torch.Tensor]:
    """A state dict of torchvision, from torch's cache or downloaded there; RewardError names the setting `key`."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    try:
        if not cached.is_file() and not _hub_answers(url.rsplit("/", 1)[0]):
            raise OSError("its server does not answer")
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no connection, or a file that is not what its name says
        raise missing_weights(name, url, key, error) from error


def load_state_dict(name: str, path: str | Path, instead: str | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors file, or of a torch file that holds nothing else. Raises RewardError.

    instead: what to use where the file is a pickled module, for the message.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise RewardError(name, got=f"no file at {path}", expected="a weights file", cure="correct the path")
    try:
        state = _read_tensors(path)
    except Exception as error:  # KeyError, EOFError, RuntimeError, UnpicklingError: whichever the damage leads to
        expected = "a state dict (safetensors, or torch.save of module.state_dict())"
        if "Unsupported global" not in str(error):
            reason = f"{type(error).__name__} on reading {path}"
            raise RewardError(name, got=reason, expected=expected, cure="download the file again") from error
        cure = f"loading it would run code from the file; {instead or 'convert it where that can do no harm'}"
        got = f"{path}, a pickled module, not plain tensors"
        raise RewardError(name, got=got, expected=expected, cure=cure) from error
    if not isinstance(state, dict):
        got, expected = f"{path} with a {type(state).__name__} in it", "a state dict: tensors by name"
        raise RewardError(name, got=got, expected=expected, cure="use the published file of this model")
    return state


def tensor_of(name: str, state: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """One tensor of a checkpoint; RewardError if it holds none of that name."""
    if not isinstance(state.get(key), torch.Tensor):
        got = f"a checkpoint without {key} (its names: {', '.join([*state][:3])}, ...)"
        cure = "use the published file of this model"
        raise RewardError(name, got=got, expected=f"the tensor {key}", cure=cure)
    return state[key]


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def hub_file(name: str, repository: str, file: str, key: str) -> str:
    """Path of a file of the hub, downloaded once. Raises RewardError, naming the setting that takes a local path."""
    from huggingface_hub import hf_hub_download

    try:
        with quick_hub():
            return hf_hub_download(repository, file)
    except Exception as error:  # offline, gated and broken connections all have types of their own
        raise missing_weights(name, repository, key, error, file) from error


def filled(name: str, source: str, build: Callable[[], torch.nn.Module], state: dict) -> torch.nn.Module:
    """build() with the weights of `state`, which must have exactly its keys and shapes; else RewardError.

    Nothing is initialised and nothing copied: the parameters are the tensors of `state`.
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
    """Shape by key; of what is no tensor, its type."""
    return {key: tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__ for key, x in state.items()}


def renamed(state: dict, names: dict[str, str], unused: tuple[str, ...]) -> dict:
    """The entries of a state dict with parts of their keys replaced; without those that have a part in `unused`."""
    kept = {key: key for key in state if not any(part in key for part in unused)}
    for old, new in names.items():
        kept = {key: name.replace(old, new) for key, name in kept.items()}
    return {name: state[key] for key, name in kept.items()}
