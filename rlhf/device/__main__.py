"""The command `python -m rlhf.device [--check]`: print the device that is used, and test it."""

import argparse
import sys
from pathlib import Path

import torch

from rlhf.device import describe, pick_device


def main(arguments: list[str]) -> int:
    """Run the command; return 0 if every difference is within its tolerance, else 1."""
    formats = ["float32", "bfloat16"]
    parser = argparse.ArgumentParser(prog="python -m rlhf.device", description="Print the device in use, and test it.")
    parser.add_argument("--check", action="store_true", help="train the nano model a little and compare with the CPU")
    parser.add_argument("--device", help="cuda, npu, mps or cpu (default: npu if USE_ASCEND_NPU=1, else what is here)")
    parser.add_argument("--dtype", nargs="+", choices=formats, default=formats, help="number formats (default: both)")
    parser.add_argument("--output", type=Path, help="also write the rows to this file, as JSON")
    args = parser.parse_args(arguments)
    try:
        device = pick_device(args.device)
    except ValueError as error:
        raise SystemExit(f"rlhf.device: error: {error}") from error
    print(f"{device}: {describe(device)}, torch {torch.__version__}")
    if not args.check:
        return 0
    # The one import of a higher room: the check trains, and nothing else of this package needs it.
    from rlhf.training.device_check import check_device, table, write_rows

    rows = check_device(device, args.dtype)
    print(table(rows))
    if args.output:
        write_rows(args.output, device, rows)
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
