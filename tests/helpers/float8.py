"""Skip tests where PyTorch has no float8 products on a CPU with a scale for each row."""

import pytest
import torch

from rlhf.adapter.float8 import require_float8


def _reason() -> str:
    try:
        require_float8(torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return ""


needs_float8 = pytest.mark.skipif(bool(_reason()), reason=_reason() or "it does")
