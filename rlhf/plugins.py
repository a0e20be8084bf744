"""PyTorch plug-ins for accelerators such as Ascend's, loaded so that a broken one does no harm.

PyTorch loads every installed plug-in while it is imported, and its import fails if one does. A
plug-in without a driver would stop every program, even on the CPU. Here such a plug-in counts as
not installed. `import rlhf` does this first.
"""

import os
import sys
from importlib.metadata import entry_points

GROUP = "torch.backends"  # the entry points that PyTorch looks for
ERRORS: dict[str, Exception] = {}  # by module name, of plug-ins that did not load


def load_plugins() -> None:
    """Load every installed plug-in; hide those that fail from libraries such as diffusers."""
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    for plugin in entry_points(group=GROUP):
        try:
            plugin.load()()
        except Exception as error:  # a half-installed driver raises anything from ImportError to OSError
            ERRORS[plugin.module] = error
            sys.modules[plugin.module] = None  # Python then raises ImportError for it
