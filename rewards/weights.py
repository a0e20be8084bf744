"""Weights of frozen models: loading without running code from a file, and saying what is missing."""

import pickle
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

from rewards.base import RewardError

# Repository -> (download size, licence) for messages.
KNOWN_WEIGHTS = {
    "openai/clip-vit-large-patch14": ("1.7 GB", "MIT, as OpenAI's CLIP code"),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ("3.9 GB", "MIT"),
    "xswu/HPSv2": ("a CLIP ViT-H/14 of 986 million parameters", "Apache-2.0"),
    "trl-lib/ddpo-aesthetic-predictor": ("3.7 MB", "Apache-2.0"),
}


class Frozen(torch.nn.Module):
    """A module that never trains: evaluation mode for good. Call `freeze` at the end of __init__."""

    def freeze(self) -> "Frozen":
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


def missing_weights(name: str, repository: str, key: str, error: Exception) -> RewardError:
    """The error for weights that are neither on disk nor to be had: what they are, and the key that takes a path."""
    size, licence = KNOWN_WEIGHTS.get(repository, ("size unknown", "licence: see its model card"))
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return RewardError(
        name,
        got=f"no weights for {repository!r} ({reason})",
        expected=f"them in the local cache, or a download from the hub ({repository}: {size}, {licence})",
        cure=f"go online once, or set `{key}` in reward_kwargs.{name} to a local path",
    )


@contextmanager
def quick_hub(local: bool = False):
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


def load_state_dict(name: str, path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors file, or of a torch file that holds nothing else. Raises RewardError."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise RewardError(name, got=f"no file at {path}", expected="a weights file", cure="correct the path")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RewardError(
            name,
            got=f"{path}, a pickled module, not plain tensors",
            expected="a state dict (safetensors, or torch.save of module.state_dict())",
            cure="loading it would run code from the file; convert it on a machine that you can afford to lose",
        ) from error
