"""What lies in a mapped file, and what code allocates."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.device.host import file_mappings


def is_mapped(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's numbers lie in a file."""
    return any(low <= tensor.data_ptr() < high for low, high in file_mappings())


class Allocations(TorchDispatchMode):
    """The CPU storages that operators make inside, kept or not."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == "cpu":
                storage = x.untyped_storage()  # kept alive, so that no other takes its place
                self.storages.setdefault(storage._cdata, storage)
        return out

    @property
    def bytes(self) -> int:
        """Bytes of all storages that lie in no file."""
        mappings = file_mappings()
        in_file = lambda storage: any(low <= storage.data_ptr() < high for low, high in mappings)
        return sum(storage.nbytes() for storage in self.storages.values() if not in_file(storage))
