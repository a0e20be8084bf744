"""Run a program on the emulated NPU: `python tests/npu/emulate.py SCRIPT [ARGUMENTS]`.

standin.py says which environment variables to set.
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[2]))

from emulator import EmulatedNPU

import rlhf  # noqa: F401 - loads torch_npu

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with EmulatedNPU() as npu:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            print("fused attention ran", npu.calls["npu.npu_fusion_attention_v3.default"], "times")
