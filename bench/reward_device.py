"""A full-size step with its reward on the same device, on a second one, and on the CPU.

    python bench/reward_device.py --limit 550           on a machine with two devices
    python bench/reward_device.py --size tiny --reward_devices cpu --output /tmp/reward_device.json

Rows go to bench/results/reward_device.json one by one; a row that is there is not measured again,
and nothing begins after --limit seconds. ContentV-8B, the Wan2.1 VAE and the reward with random
weights, on which time and memory do not depend. The window is decoding, scoring and the last
denoising step with their gradient; the step is a whole one of --steps denoising steps. The peak is
that of the first device, the reward's weights included if they are there.

Prediction for hps_v2_1 (3.7 GiB of weights) at 33 frames: with the reward on the second device the
first one's peak is 3.7 GiB lower in the window, and the step less than 1 % slower, since 12 MB of
pixels cross twice. On the CPU the reward takes seconds: the step is 5 to 20 % slower.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, free_memory, make_parser, read_rows, scored_frames, show_row, write_rows
from reward_costs import build
from step import Bench, measure
from step_arms import SIZES, Rig

from rewards.placement import OnDevice
from rlhf.device import pick_device

RESULT = Path(__file__).parent / "results" / "reward_device.json"
ARM, PHASES = "exact", ("window", "step")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the command's flags."""
    parser = make_parser(__doc__)
    parser.add_argument("--reward", default="hps_v2_1", help="a built-in reward")
    parser.add_argument("--reward_devices", nargs="+", help="default: the run's device, the second one, and cpu")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--scored", default="first", help="frames the reward is given: first, all or a number")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps of a whole step")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--device", help="default: the accelerator of this machine")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no phase is begun")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args(argv)


def key(row: dict) -> tuple:
    """Return what identifies a row."""
    return row["reward"], row["reward_device"], row["frames"], row["scored"], row["phase"]


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    began, arguments = time.perf_counter(), parse(argv)
    device, size = pick_device(arguments.device), SIZES[arguments.size]
    about = environment(device) | {"devices": torch.accelerator.device_count(), "size": arguments.size}
    rows = read_rows(arguments.output, about, key)
    scored = scored_frames(arguments.scored, arguments.frames)
    rig = Rig(ARM, size, arguments.frames, arguments.steps, scored, device)
    for place in arguments.reward_devices or [f"{device.type}:0", f"{device.type}:1", "cpu"]:
        reward = OnDevice(arguments.reward, build(arguments.reward, torch.device("cpu"), None), place)
        for phase in PHASES:
            row = {"reward": arguments.reward, "reward_device": place, "frames": arguments.frames}
            row |= {"scored": scored, "phase": phase}
            if key(row) in rows or time.perf_counter() - began > arguments.limit:
                continue
            row |= measure(getattr(Bench(rig, reward, scored), phase), device, arguments.repeats, warm=False)
            row.pop("gradient", None)
            rows[key(row)] = row
            show_row(row)
            write_rows(arguments.output, about, rows.values())
        del reward
        free_memory(device)


if __name__ == "__main__":
    main()
