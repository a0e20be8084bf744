"""RLHF by reward gradient for text-to-video: generators, the trainer and the embedded nano model.

The public names load on first use, so that `import rlhf` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rlhf.plugins import load_plugins

if TYPE_CHECKING:
    from rlhf.config import RewardGradientConfig
    from rlhf.generator.loading import load_pipeline
    from rlhf.trainer import RewardGradientTrainer

__all__ = ["RewardGradientConfig", "RewardGradientTrainer", "load_pipeline"]

_HOME = {
    "RewardGradientConfig": "rlhf.config",
    "RewardGradientTrainer": "rlhf.trainer",
    "load_pipeline": "rlhf.generator.loading",
}

load_plugins()  # before torch and diffusers are imported


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
