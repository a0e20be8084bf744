"""What lies in a mapped file, and what code allocates."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.device.host import file_mappings


def is_mapped(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's numbers lie in a file."""
    return any(low <= tensor.data_ptr() < high for low, high in file_mappings())


class Allocations(TorchDispatchMode):
    """The bytes of all CPU storages that operators make inside, kept or not."""

    def __init__(self):
        super().__init__()
        self.storages, self.bytes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == "cpu" and not is_mapped(x):
                storage = x.untyped_storage()
                if storage._cdata not in {s._cdata for s in self.storages}:
                    self.storages.append(storage)  # alive, so that no other takes its place
                    self.bytes += storage.nbytes()
        return out
