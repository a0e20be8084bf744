"""Reward models: frozen, differentiable functions from a video and its prompt to one score.

`import rewards` loads no model library. Each name below is imported from its module at first use.
The packages of a reward (open_clip, transformers) are imported when that reward is loaded.
"""

from importlib import import_module

import rlhf  # noqa: F401 - it has to come before torch, see rlhf.plugins

_MODULES = {
    "Reward": "contract",
    "RewardError": "contract",
    "RewardMix": "mix",
    "built_in_names": "load",
    "check_spec": "load",
    "frames_needed": "contract",
    "load_reward": "load",
    "probe": "contract_probe",  # not probe.py: the submodule would hide the function
    "reward_attribute": "contract",
    "reward_name": "contract",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    """Import a public name from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module 'rewards' has no attribute {name!r}")
    return getattr(import_module(f"rewards.{_MODULES[name]}"), name)
