"""A full-size step in every layout of several devices, against one device.

    torchrun --nproc_per_node 2 bench/scale.py          all layouts of two devices
    torchrun --nproc_per_node 2 bench/scale.py --only sequence --frames 33 --limit 300
    torchrun --nproc_per_node 4 bench/scale.py --tiny --output /tmp/scale.json      on CPUs
    python bench/tables.py                              writes the tables

Any number of devices: also 1, and over several hosts as torchrun starts them. Rows go to
bench/results/scale.json one by one; a row that is there is not measured again, and nothing begins
after --limit seconds. ContentV-8B and the Wan2.1 VAE with random weights, on which time and memory
do not depend.

Phases, for one video of each data rank: sampling, a guided denoising step without gradient;
segment, one with gradient, both branches forward and backward; decode, the scored frames likewise;
sum, adding up the adapters' gradients and taking the optimizer's step; step, a whole step worked
out of these: (N - 1) sampling + segment + decode + sum.
Efficiency is videos per second and device, against one device. Equality: the adapter's first
gradient and its weights after five steps of a small model, against one device on the same videos.

Prediction for 2 devices at 125 frames: data and guidance above 0.97, sequence above 0.93 on the
segment, since a block's exchanges move 0.4 GB in about 2 ms of its 90; the sharded base 8 GiB
smaller and at most a tenth slower.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# NVLink multicast can put a shared host's devices out of service. Read when the libraries start.
os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, free_memory, make_parser, read_rows, scored_frames, show_row, write_rows
from scale_arms import ONE, Bench, arms, equality
from step_arms import SIZES

from rlhf.config import RewardGradientConfig
from rlhf.device import peak_memory, reset_peak_memory, synchronize
from rlhf.distributed.accelerator import make_accelerator
from rlhf.distributed.layout import Sizes

RESULT = Path(__file__).parent / "results" / "scale.json"
GIB = 2**30
PHASES, WORKED_OUT = ("sampling", "segment", "decode", "sum"), "step"


# ---------------------------------------------------------------------------------------- measuring


def measure(work: Callable[[], None], accelerator, repeats: int, alone: bool) -> dict:
    """Return the slowest device's median seconds, after a warm-up, and the highest peak of any."""
    device, seconds, peaks = accelerator.device, [], []
    for _ in range(1 + repeats):
        accelerator.wait_for_everyone()
        reset_peak_memory(device)
        synchronize(device)
        began = time.perf_counter()
        if not alone or accelerator.is_main_process:  # others wait
            work()
        synchronize(device)
        told = torch.tensor([time.perf_counter() - began, peak_memory(device) / GIB], device=device)
        slowest, most = accelerator.gather(told).view(-1, 2).amax(0).tolist()
        seconds.append(slowest)
        peaks.append(most)
    seconds, peaks = seconds[1:], peaks[1:]
    return {"seconds": statistics.median(seconds), "all": seconds, "peak_gib": max(peaks)}


def key(row: dict) -> tuple:
    """Return what identifies a row."""
    return row["arm"], row["devices"], row["frames"], row["phase"]


def with_efficiency(row: dict, rows: dict[tuple, dict]) -> dict:
    """Return the row with its videos per second and device over those of one device."""
    alone = rows.get((ONE, 1, row["frames"], row["phase"]))
    if alone is None or "seconds" not in alone or "seconds" not in row:
        return row
    return row | {"efficiency": alone["seconds"] * row["data"] / (row["seconds"] * row["devices"])}


def worked_out(told: dict, rows: dict[tuple, dict], steps: int) -> dict | None:
    """Return the row of a whole step; None until all of its phases are measured."""
    of_phases = [rows.get(key(told | {"phase": phase})) for phase in PHASES]
    if any(row is None or "seconds" not in row for row in of_phases):
        return None
    times = {"sampling": steps - 1}
    seconds = sum(row["seconds"] * times.get(row["phase"], 1) for row in of_phases)
    return (
        told
        | {"phase": WORKED_OUT, "steps": steps, "seconds": seconds}
        | {"peak_gib": max(row["peak_gib"] for row in of_phases)}
    )


class Run:
    """What is measured, and where the rows go."""

    def __init__(self, arguments: argparse.Namespace, accelerator):
        self.arguments, self.accelerator, self.began = arguments, accelerator, time.perf_counter()
        self.size = SIZES["tiny" if arguments.tiny else "full"]
        self.scored = scored_frames(arguments.scored, arguments.frames)
        self.about = environment(accelerator.device) | {
            "height": self.size.height,
            "width": self.size.width,
            "scored": self.scored,
            "repeats": arguments.repeats,
            "size": "tiny" if arguments.tiny else "full",
        }
        self.rows = read_rows(arguments.output, self.about, key)
        self.bench: Bench | None = None
        self.accelerator.wait_for_everyone()  # all have read

    def arm(self, name: str, settings: dict) -> None:
        """All phases of an arm that are missing."""
        alone, devices = name == ONE, 1 if name == ONE else self.accelerator.num_processes
        sizes = Sizes.from_settings(RewardGradientConfig(**settings), devices)
        told = {"arm": name, "devices": devices, "frames": self.arguments.frames, "layout": str(sizes)}
        told |= {"data": sizes.data}
        if not alone:
            self._add(told, "equality", lambda: equality(settings, self.accelerator))
        for phase in PHASES:
            self._add(told, phase, lambda phase=phase: self._measure(settings, alone, phase))
        if row := worked_out(told, self.rows, self.arguments.steps):
            self._keep(row)

    def _measure(self, settings: dict, alone: bool, phase: str) -> dict:
        sharded = "shard_base" in settings
        if self.bench is None or sharded != self.bench.rig.args.shard_base:
            self.bench = None  # the one before goes before the next one comes
            free_memory(self.accelerator.device)
            arguments = self.arguments
            own = settings if sharded else {}
            self.bench = Bench(self.size, arguments.frames, arguments.steps, self.scored, self.accelerator, own)
        self.bench.use(settings, alone)
        return measure(getattr(self.bench, phase), self.accelerator, self.arguments.repeats, alone)

    def _add(self, told: dict, phase: str, work: Callable[[], dict]) -> None:
        row = told | {"phase": phase}
        if key(row) in self.rows and not self.arguments.again:
            return
        late = time.perf_counter() - self.began > self.arguments.limit
        late = torch.tensor([late], device=self.accelerator.device)
        if self.accelerator.gather(late).any():  # all processes stop together
            return
        try:
            found = work()
        except torch.OutOfMemoryError:
            found = {"skipped": "out of memory"}
        except (RuntimeError, ValueError, AssertionError) as error:  # told, and the next one is tried
            found = {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        self._keep(row | found)

    def _keep(self, row: dict) -> None:
        row = with_efficiency(row, self.rows)
        self.rows[key(row)] = row
        if self.accelerator.is_main_process:
            write_rows(self.arguments.output, self.about, self.rows.values())
            show_row(row)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the command's flags."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="ARM", help="some of: " + ", ".join(arms(4)))
    parser.add_argument("--frames", type=int, default=125)
    parser.add_argument("--scored", default="first", help="frames that are decoded: first, all or a number")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps of the whole step that is worked out")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on CPUs, to try the script")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which nothing is begun")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already, too")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    arguments = parse(argv)
    settings = {"device": "cpu"} if arguments.tiny else {}
    accelerator = make_accelerator(RewardGradientConfig(report_to=[], **settings))
    run, possible = Run(arguments, accelerator), arms(accelerator.num_processes)
    for name in arguments.only or possible:
        if name in possible:
            run.arm(name, possible[name])
    accelerator.end_training()


if __name__ == "__main__":
    main()
