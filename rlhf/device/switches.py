"""PyTorch's switches of precision, kernels and determinism, and the accelerator's random state.

`SWITCHES` and `RANDOM_STATE` are pairs of functions that read and write; whoever runs the code of
others keeps what they read.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from operator import attrgetter

import torch
from torch.backends import cuda, cudnn, mkldnn


def _get_and_set(owner, name: str) -> tuple[Callable, Callable]:
    """Return functions that read and write an attribute; the name may have dots."""
    return partial(attrgetter(name), owner), partial(setattr, owner, name)


def _older_precision() -> tuple[str | None, bool | None]:
    """Return the older switches of products and convolutions; None where only newer ones are used.

    PyTorch raises an error for an older switch that contradicts a newer one.
    """
    values: list = [None, None]
    for index, read in enumerate((torch.get_float32_matmul_precision, lambda: cudnn.allow_tf32)):
        with suppress(RuntimeError):
            values[index] = read()
    return tuple(values)


def _accelerator():
    """Return the accelerator's module, such as torch.cuda; None if none is initialised."""
    device = torch.accelerator.current_accelerator()
    module = device and torch.get_device_module(device)
    return module if module and getattr(module, "is_initialized", module.is_available)() else None


def _accelerator_state() -> torch.Tensor | None:
    """Return the accelerator's random state, None before its use."""
    module = _accelerator()
    return module and module.get_rng_state()


# In this order: PyTorch's older switches of float32 change the newer ones.
SWITCHES = (
    (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda modes: torch.use_deterministic_algorithms(modes[0], warn_only=modes[1]),
    ),
    (lambda: _older_precision()[0], lambda value: value and torch.set_float32_matmul_precision(value)),
    (lambda: _older_precision()[1], lambda value: value is not None and setattr(cudnn, "allow_tf32", value)),
    *(_get_and_set(owner, "fp32_precision") for owner in (torch.backends, cudnn, mkldnn, cuda.matmul)),
    *(_get_and_set(owner, "fp32_precision") for owner in (cudnn.conv, cudnn.rnn)),
    *(_get_and_set(owner, "fp32_precision") for owner in (mkldnn.matmul, mkldnn.conv, mkldnn.rnn)),
    *(_get_and_set(cuda.matmul, f"allow_{dtype}_reduced_precision_reduction") for dtype in ("fp16", "bf16")),
    *(_get_and_set(cudnn, name) for name in ("enabled", "benchmark", "deterministic")),
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
)
RANDOM_STATE = (_accelerator_state, lambda state: state is not None and _accelerator().set_rng_state(state))
