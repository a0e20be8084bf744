"""What autograd keeps for the backward pass, counted in bytes on any device."""

import weakref
from contextlib import contextmanager

import torch


class KeptBytes:
    """`now` and `most`: bytes of the storages that autograd holds, parameters left out.

    with KeptBytes(module) as kept:
        y = f(x)
        kept.now            # what y's graph holds
        y.sum().backward()
        kept.most           # what was held at any time
    """

    def __init__(self, *modules: torch.nn.Module):
        self.weights = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
        self.users: dict[int, int] = {}
        self.now = self.most = 0

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda box: box.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    def _pack(self, tensor):
        box, storage = _Box(tensor), tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.weights:
            self.users[key] = self.users.get(key, 0) + 1
            self.now += size if self.users[key] == 1 else 0
            self.most = max(self.most, self.now)
            weakref.finalize(box, self._free, key, size)
        return box

    def _free(self, key, size):
        self.users[key] -= 1
        self.now -= size if self.users[key] == 0 else 0


class _Box:
    def __init__(self, tensor):
        self.tensor = tensor


@contextmanager
def counted_calls(monkeypatch, module, name: str):
    """Inside, a list that grows by one item with each call of module.name."""
    calls, function = [], getattr(module, name)

    def counting(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, counting)
    yield calls
    monkeypatch.setattr(module, name, function)
