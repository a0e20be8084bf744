"""Seconds and peak memory of each built-in reward at full size with random weights.

    python bench/reward_costs.py [--rewards clip_score hps_v2_1] [--device cuda]
    python bench/reward_costs.py --package     # writes the results into the planner's file
    python bench/tables.py                     # writes bench/results/rewards.md

One video of 432x768, 1 and 8 frames, all of them scored at once. Models run in their own format,
and in bfloat16 if they take a format. Nothing is loaded from hub or disk. Rows of other rewards
stay in the file, if they were measured in the same environment.

Prediction: forward and backward take two to three times as long as the forward pass, since weights
are frozen. Memory above the weights grows with frames times layers.
"""

import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, free_memory, make_parser, read_rows, write_rows

from rewards import RewardError, load_reward
from rewards.catalogue import CATALOGUE
from rewards.load import import_built_in
from rlhf.device import peak_memory, pick_device, reset_peak_memory, synchronize
from rlhf.planner.reward_costs import COSTS_FILE

RESULT = Path(__file__).parent / "results" / "rewards.json"
FRAMES, GIB = (1, 8), 2**30
PHASES = {"forward": False, "forward and backward": True}
MEASURED = [
    name
    for name, entry in CATALOGUE.items()
    if "this package" not in entry.weights and not entry.input.startswith("latents")
]
INFO = {"fps": 8, "seed": 0, "step": 0}  # so that "8 fps" takes every frame
PROMPT = "a red fox runs through deep snow, slow motion"


def build(name: str, device: torch.device, dtype: str | None) -> Callable:
    """Return the reward on the device with random weights. It scores every frame."""
    settings = {"frames": "all", "dtype": dtype} if dtype else {"frames": "all"}
    settings = {key: value for key, value in settings.items() if key in accepted(name)}
    if not CATALOGUE[name].weights:
        return load_reward(name, **settings)
    with torch.device(device):
        return import_built_in(name).random_init(**settings).to(device)


def accepted(name: str) -> set[str]:
    """Return the names of a reward's settings, those of its base classes included."""
    makers = (vars(c)["__init__"] for c in import_built_in(name).__mro__ if inspect.isfunction(vars(c).get("__init__")))
    return {parameter for make in makers for parameter in inspect.signature(make).parameters}


def formats(name: str) -> list[str | None]:
    """Return the formats to measure; None is the reward's own."""
    return [None, "bfloat16"] if "dtype" in accepted(name) and CATALOGUE[name].bytes_each == 4 else [None]


def measure(reward: Callable, video_BCTHW: torch.Tensor, backward: bool, repeats: int) -> dict:
    """Return {"seconds": median, "peak_gib"} after two warm-up calls, or {"skipped": why}."""
    device, seconds = video_BCTHW.device, []
    try:
        for i in range(2 + repeats):
            pixels_BCTHW = video_BCTHW.clone().requires_grad_(backward)
            reset_peak_memory(device)
            synchronize(device)
            began = time.perf_counter()
            with torch.set_grad_enabled(backward):
                scores_B = reward(pixels_BCTHW, [PROMPT], **INFO)
            if backward:
                scores_B.sum().backward()
            synchronize(device)
            seconds += [time.perf_counter() - began] if i >= 2 else []
    except RewardError as error:
        return {"skipped": f"{error.got}; expected {error.expected}"}
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    return {"seconds": statistics.median(seconds), "peak_gib": peak_memory(device) / GIB}


def rows_of(name: str, device: torch.device, size: tuple[int, int], repeats: int) -> list[dict]:
    """Return a row for each format, number of frames and phase."""
    rows = []
    for dtype in formats(name):
        reward = build(name, device, dtype)
        weights = list(reward.parameters()) if isinstance(reward, torch.nn.Module) else []
        held = sum(p.numel() * p.element_size() for p in weights) / GIB
        form = str(max(weights, key=torch.numel, default=torch.zeros(0)).dtype).removeprefix("torch.")
        for frames in FRAMES:
            video_BCTHW = torch.rand(1, 3, frames, *size, generator=torch.Generator().manual_seed(0)).to(device)
            for phase, backward in PHASES.items():
                told = {"arm": name, "dtype": form, "frames": frames, "phase": phase, "weights_gib": held}
                rows.append(told | measure(reward, video_BCTHW, backward, repeats))
                print(rows[-1], flush=True)
        del reward, weights
        free_memory(device)
    return rows


def key(row: dict) -> tuple:
    """Return what identifies a row."""
    return row["arm"], row["dtype"], row["frames"], row["phase"]


def package(result: dict) -> str:
    """Return the content of the planner's file of costs, measured forward and backward."""
    about, costs = {name: result["environment"][name] for name in ("device", "height", "width")}, {}
    for row in result["rows"]:
        if row["phase"] == "forward and backward" and "seconds" in row:
            empty = {"weights_gib": round(row["weights_gib"], 3), "frames": {}}
            cost, above = costs.setdefault(f"{row['arm']} {row['dtype']}", empty), row["peak_gib"] - row["weights_gib"]
            cost["frames"][str(row["frames"])] = round(row["seconds"], 4), round(max(0.0, above), 3)
    lines = ",\n".join(f'  "{key}": {json.dumps(cost)}' for key, cost in sorted(costs.items()))
    return f'{{\n "about": {json.dumps(about)},\n "costs": {{\n{lines}\n }}\n}}\n'


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--rewards", nargs="+", choices=MEASURED, default=MEASURED, metavar="NAME")
    parser.add_argument("--device", help="default: the accelerator of this machine")
    parser.add_argument("--size", type=int, nargs=2, default=(432, 768), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument(
        "--package", action="store_true", help="measure nothing; write the results into rlhf.planner.reward_costs"
    )
    arguments = parser.parse_args(argv)
    if arguments.package:
        COSTS_FILE.write_text(package(json.loads(arguments.output.read_text())))
        return
    device, size = pick_device(arguments.device), tuple(arguments.size)
    about = environment(device) | {"height": size[0], "width": size[1], "repeats": arguments.repeats}
    rows = read_rows(arguments.output, about, key)
    for name in arguments.rewards:
        rows |= {key(row): row for row in rows_of(name, device, size, arguments.repeats)}
        ordered = sorted(rows.values(), key=lambda row: MEASURED.index(row["arm"]))
        write_rows(arguments.output, about, ordered)


if __name__ == "__main__":
    main()
