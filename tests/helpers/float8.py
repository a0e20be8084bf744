"""Whether this PyTorch multiplies in float8 on a CPU, rows scaled on their own: older ones may not."""

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
