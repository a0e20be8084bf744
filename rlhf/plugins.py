"""Plug-ins of accelerators that are no part of PyTorch itself, such as Ascend's.

PyTorch loads every installed one while it is imported, and fails with it: a plug-in without its driver would leave no
program running, not even on the CPU. Here one that cannot load counts as not installed. `import rlhf` does this first.
"""

import os
import sys
from importlib.metadata import entry_points

GROUP = "torch.backends"  # the entry points that PyTorch looks for
ERRORS: dict[str, Exception] = {}  # why a plug-in did not load, by the name of its module


def load_plugins() -> None:
    """Load every installed plug-in; hide those that fail from everybody (diffusers imports what is installed)."""
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    for plugin in entry_points(group=GROUP):
        try:
            plugin.load()()
        except Exception as error:  # a half-installed driver raises anything from ImportError to OSError
            ERRORS[plugin.module] = error
            sys.modules[plugin.module] = None  # Python's own mark of a module that must not be imported
