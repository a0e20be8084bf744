"""Reward models: frozen, differentiable functions from a video and its prompt to one score.

`import rewards` is light: each name below is imported from its file when it is first used, and a reward's own
packages (open_clip, transformers) only when that reward is loaded.
"""

from importlib import import_module

import rlhf  # noqa: F401 - it has to come before torch, see rlhf.plugins

_HOME = {
    "Reward": "contract",
    "RewardError": "contract",
    "RewardMix": "mix",
    "built_in_names": "load",
    "check_spec": "load",
    "frames_needed": "contract",
    "load_reward": "load",
    "probe": "contract",
    "reward_attribute": "contract",
    "reward_name": "contract",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'rewards' has no attribute {name!r}")
    return getattr(import_module(f"rewards.{_HOME[name]}"), name)
