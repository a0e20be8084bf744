"""Estimates of the planner beside measurements: peak memory and seconds of an optimizer step.

    python bench/planner.py                           everything, on this machine's accelerator
    python bench/planner.py --stages predict table    new estimates, without a device

Rows go to bench/results/planner.json one by one; the same command goes on with what is missing. The
table goes to bench/results/planner.md.

Four kinds of rows: what a device does in a second, for `rlhf.planner.time.RATES`; nano in the real
trainer; ContentV-8B with random weights, by bench/step.py; and the rows of bench/results/step.json,
step_2026.json and scale.json, as they are. In rows that say "extrapolated", one denoising step was
measured and counted for all.

Memory is what PyTorch calls allocated.

Prediction: memory within 15 %, time within 35 %.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, free_memory, make_parser, read_rows, write_rows
from planner_arms import CAPS_GIB, FULL, NANO, STEPS, settings_of, settings_of_layout, settings_of_step
from step import Bench, limit_memory, measure
from step_arms import SIZES, Rig, make_reward

from rewards.models.latent_reward import PUBLISHED_BLOCKS, HeadFacts, LatentHead, save_head
from rlhf.config import RewardGradientConfig, with_sampling
from rlhf.device import (
    describe,
    non_pytorch_memory,
    peak_memory,
    pick_device,
    reset_peak_memory,
    time_call,
)
from rlhf.execution.attention import attention_function, time_kernels
from rlhf.generator.files import model_sizes
from rlhf.generator.registry import CONTENTV_8B
from rlhf.planner.search import Planner
from rlhf.planner.time import H200, Rates
from rlhf.trainer import RewardGradientTrainer

RESULT = Path(__file__).parent / "results" / "planner.json"
GIB, FPS = 2**30, 24


def peak(device: torch.device) -> float | None:
    """Return the peak GiB; None for a CPU."""
    return None if device.type == "cpu" else peak_memory(device) / GIB


# ------------------------------------------------------------------------------------- measurements


def measure_nano(arm: str, size: str, device: torch.device) -> dict:
    """Measure whole steps of the real trainer."""
    with tempfile.TemporaryDirectory() as folder:
        common = {"output_dir": f"{folder}/run", "report_to": ["none"], "max_steps": 5}
        settings = common | {"device": device.type} | settings_of(arm, size)
        trainer = RewardGradientTrainer(args=RewardGradientConfig(**settings))
        trainer.step(0)
        clean(device)
        seconds = [trainer.step(number)["seconds"] for number in (1, 2, 3)]
        return {"seconds": sorted(seconds)[1], "all": seconds, "peak_gib": peak(device)}


def measure_full(arm: str, size: str, device: torch.device, reward: Callable) -> dict:
    """Measure a whole step of ContentV-8B with random weights, after one to load kernels."""
    frames, scored, _ = FULL[arm]
    rig = Rig(arm, SIZES[size], frames, STEPS, scored, device, settings=settings_of(arm, size))
    limit_memory(device, CAPS_GIB.get(arm))
    return measure(Bench(rig, reward, scored).step, device, repeats=1, warm=False)


def measure_rates(device: torch.device, size: str) -> dict:
    """Measure what the device does in a second, at ContentV-8B's sizes."""
    small = 1 if size == "full" else 16
    rows, channels, tokens, copied = 8192 // small, 192 // small, 8192 // small, 2**28 // small
    flops = {}
    for dtype in (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        make = partial(torch.randn, device=device, dtype=dtype)
        multiply = partial(torch.matmul, make(rows, 2432), make(2432, 9728))
        flops[f"matrix {name}"] = 2 * rows * 2432 * 9728 / fastest(multiply, device)
        video, kernel = make(1, channels, 4, 216, 384 // small), make(channels, channels, 3, 3, 3)
        convolve = partial(F.conv3d, video, kernel, padding=1)
        flops[f"conv {name}"] = 2 * 27 * channels * video.numel() / fastest(convolve, device)
        query = make(1, 38, tokens, 64)
        kernels = {} if device.type == "cpu" else time_kernels(device, dtype, 38, 64)
        attend = partial(attention_function(next(iter(kernels), None)), query, query, query)
        flops[f"attention {name}"] = 4 * 38 * tokens**2 * 64 / fastest(attend, device)
    ones = partial(torch.ones, device=device, dtype=torch.bfloat16)
    x, factors = ones(copied // 4864, 2432), ones(2432)
    memory = 2 * x.nbytes / fastest(lambda: x * factors, device)
    host = peer = memory
    there = torch.empty(copied, dtype=torch.uint8, device=device)
    if device.type != "cpu":
        pinned = torch.empty(copied, dtype=torch.uint8, pin_memory=True)
        host = copied / fastest(lambda: there.copy_(pinned, non_blocking=True), device)
        peer = host
    if device.type != "cpu" and torch.accelerator.device_count() > 1:
        neighbour = torch.empty_like(there, device=torch.device(device.type, 1))
        peer = copied / fastest(lambda: there.copy_(neighbour, non_blocking=True), device)
    rates = Rates(flops, memory, host, peer, non_pytorch_memory(device))
    return {"device": describe(device)} | dataclasses.asdict(rates)


def fastest(work: Callable, device: torch.device) -> float:
    """Return the seconds of one call: the best of three rounds of many calls."""
    work()
    calls = max(1, round(0.05 / time_call(work, device)))
    rounds = (time_call(lambda: [work() for _ in range(calls)], device) for _ in range(3))
    return min(rounds) / calls


# ---------------------------------------------------------------------------------------- estimates


def planner_of(settings: dict, model: str, rates: Rates = H200, size: str = "full", processes: int = 1) -> Planner:
    """Return the planner of a run with random weights."""
    card = model_sizes(model)
    if model == CONTENTV_8B:
        for name in ("transformer", "vae"):
            card = card | {name: card[name] | getattr(SIZES[size], name)}
        card["sampling"] = card["sampling"] | {"fps": FPS}
    args = with_sampling(RewardGradientConfig(**settings), card["sampling"])
    return Planner(args, card, rates, processes=processes)


def predicted(arm: str, size: str, rates: Rates) -> dict:
    """Return the planner's estimate of an arm, from its settings alone."""
    model = "nano" if arm in NANO else CONTENTV_8B
    estimate = planner_of(settings_of(arm, size), model, rates, size).estimate()
    memory, seconds = estimate.memory, estimate.time
    return {
        "peak_gib": memory.peak_bytes / GIB,
        "held_gib": {name: value / GIB for name, value in memory.held.items()},
        "phases_gib": {name: value / GIB for name, value in memory.phases.items()},
        "seconds": sum(seconds.values()),
        "phases_seconds": seconds,
    }


def compare(row: dict, prediction: dict) -> dict:
    """Return the row with its estimate and the ratios to what was measured."""
    row = row | {"predicted": prediction}
    for key in ("peak_gib", "seconds"):
        if row["measured"][key]:
            row[f"{key}_ratio"] = prediction[key] / row["measured"][key]
    return row


def compare_steps(rows: list[dict]) -> list[dict]:
    """Return rows for the whole steps of bench/results/step.json."""
    with tempfile.TemporaryDirectory() as folder:
        head = Path(folder) / "head.safetensors"  # of the latent reward that was measured
        save_head(head, LatentHead(8), HeadFacts("", "", PUBLISHED_BLOCKS, {}, 0.0, 1.0, {}))
        return _compare_steps(rows, head)


def _compare_steps(rows: list[dict], head: Path) -> list[dict]:
    """Return rows for the whole steps, those of prfl with the latent reward of a file."""
    found = []
    for row in rows:
        if "seconds" in row and row["phase"] == "step" and (settings := settings_of_step(row, head)) is not None:
            estimate = planner_of(settings, CONTENTV_8B).estimate()
            measured = {"peak_gib": row["peak_gib"], "seconds": row["seconds_per_gradient"]}
            prediction = {"peak_gib": estimate.memory.peak_bytes / GIB, "seconds": estimate.step_seconds}
            arm = f"step.py: {row['arm']}, {row['frames']} frames, {row['scored']} scored, {row['steps']} steps"
            found.append(compare({"arm": arm, "measured": measured}, prediction))
    return found


def predict_layout(row: dict, about: dict) -> dict[str, dict]:
    """Return {phase: {"peak_gib", "seconds"}} for a row of bench/results/scale.json."""
    planner = planner_of(settings_of_layout(row, about), CONTENTV_8B, processes=row["devices"])
    estimate = planner.estimate()
    memory, seconds = estimate.memory, estimate.time
    held = memory.held_bytes - memory.held["rewards"]
    names = {"sampling": "sampling", "segment": "gradient window", "sum": "optimizer"}
    found = {phase: {"peak_gib": (held + memory.phases[name]) / GIB} for phase, name in names.items()}
    peak_gib = max(phase["peak_gib"] for phase in found.values())
    whole = sum(seconds.values()) - seconds["reward"]
    return found | {"step": {"peak_gib": peak_gib, "seconds": whole}}


def compare_layouts(result: dict) -> list[dict]:
    """Return rows for the whole steps of bench/results/scale.json."""
    found = []
    for row in result["rows"]:
        if row["phase"] == "step" and "seconds" in row:
            arm = f"scale.py: {row['arm']}, {row['devices']} device(s), {row['frames']} frames"
            measured = {key: row[key] for key in ("peak_gib", "seconds")}
            prediction = predict_layout(row, result["environment"])["step"]
            found.append(compare({"arm": arm, "measured": measured}, prediction))
    return found


def accuracy(rows: list[dict]) -> dict[str, tuple[float, float, int]]:
    """Return {"peak_gib" or "seconds": (largest error, mean error, number of rows)}."""
    found = {}
    for key in ("peak_gib", "seconds"):
        errors = [abs(row[f"{key}_ratio"] - 1) for row in rows if f"{key}_ratio" in row]
        found[key] = (0.0, 0.0, 0)
        if errors:
            found[key] = max(errors), statistics.mean(errors), len(errors)
    return found


def accuracy_text(rows: list[dict]) -> str:
    """Return two sentences about the errors."""
    told = accuracy(rows).items()
    return "\n".join(
        f"{name}: {worst:.0%} off at most, {mean:.0%} on average, over {count} settings."
        for name, (_, (worst, mean, count)) in zip(("Memory", "Time"), told, strict=True)
    )


def table(result: dict) -> str:
    """Return bench/results/planner.md: a row for each setting, then the errors."""
    about, lines = result["environment"], ["# Estimates of the planner beside measurements", ""]
    lines += [f"Measured on {about['device']} ({about['cores']} cores), torch {about['torch']}.", ""]
    headings = "| setting | GiB measured | estimated | | seconds a step measured | estimated | |"
    lines += [headings, "|---" * 7 + "|"]
    for row in result["rows"]:
        if "predicted" in row:
            cells = [_cells(row, key) for key in ("peak_gib", "seconds")]
            lines.append(f"| {row['arm']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", accuracy_text(result["rows"])]) + "\n"


def _cells(row: dict, key: str) -> str:
    values = [row[part][key] for part in ("measured", "predicted")]
    ratio = f"{row[f'{key}_ratio'] - 1:+.0%}" if f"{key}_ratio" in row else "-"
    return " | ".join([*("-" if value is None else f"{value:.2f}" for value in values), ratio])


# -------------------------------------------------------------------------------------- the command


def clean(device: torch.device) -> None:
    """Free the device's memory and reset its peak."""
    free_memory(device)
    reset_peak_memory(device)


def measured_row(arm: str, size: str, device: torch.device, reward: Callable | None) -> dict:
    """Return the arm's row. A failure becomes part of the row, so that the other arms run."""
    row = {"arm": arm, "settings": settings_of(arm, size)}
    try:
        found = measure_nano(arm, size, device) if arm in NANO else measure_full(arm, size, device, reward)
        return row | ({"error": found["skipped"]} if "skipped" in found else {"measured": found})
    except (RuntimeError, ValueError) as error:  # out of memory is a RuntimeError
        return row | {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    finally:
        limit_memory(device, None)
        clean(device)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the command's flags."""
    parser = make_parser(__doc__)
    arms, stages = ["rates", *NANO, *FULL], ["measure", "predict", "table"]
    parser.add_argument("--only", nargs="+", choices=arms, default=arms, metavar="ARM")
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages)
    parser.add_argument("--size", choices=list(SIZES), default="full", help="tiny: everything, for a try on a CPU")
    parser.add_argument("--device", help="default: the accelerator of this machine")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no arm is begun")
    parser.add_argument("--again", action="store_true", help="measure rows that exist already, too")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args(argv)


def measure_arms(arguments: argparse.Namespace) -> None:
    """Measure the arms that the result lacks."""
    began, device, output = time.perf_counter(), pick_device(arguments.device), arguments.output
    about = environment(device) | {"size": arguments.size, "steps": STEPS}
    rows = read_rows(output, about, lambda row: row["arm"])
    reward = None
    for arm in arguments.only:
        done = arm in rows and "error" not in rows[arm] and not arguments.again
        if done or time.perf_counter() - began > arguments.limit:
            continue
        if arm in FULL and reward is None:
            reward = make_reward(arguments.size, 8, device)
        if arm == "rates":
            rows[arm] = {"arm": arm, "rates": measure_rates(device, arguments.size)}
            clean(device)
        else:
            rows[arm] = measured_row(arm, arguments.size, device, reward)
        write_rows(output, about, rows.values())
        seconds, outcome = time.perf_counter() - began, rows[arm].get("error", "measured")
        print(f"{arm}: {outcome}, {seconds:.0f} s", flush=True)


def predict(arguments: argparse.Namespace) -> None:
    """Write the estimates of all arms beside their measurements."""
    result = json.loads(arguments.output.read_text())
    about, rows = result["environment"], {row["arm"]: row for row in result["rows"]}
    rates = {name: value for name, value in rows["rates"]["rates"].items() if name != "device"}
    for arm in arguments.only:
        if "measured" in rows.get(arm, {}):
            rows[arm] = compare(rows[arm], predicted(arm, about["size"], Rates(**rates)))
            print(f"{arm}: estimated", flush=True)
    if about["size"] == "full":
        read = lambda name: json.loads((RESULT.parent / name).read_text())
        steps = [*read("step_2026.json")["rows"], *read("step.json")["rows"]]
        others = compare_steps(steps) + compare_layouts(read("scale.json"))
        rows = {arm: row for arm, row in rows.items() if not arm.startswith("step.py: ")}
        rows |= {row["arm"]: row for row in others}
    write_rows(arguments.output, about, rows.values())


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    if "measure" in arguments.stages:
        measure_arms(arguments)
    if "predict" in arguments.stages:
        predict(arguments)
    if "table" in arguments.stages:
        text = table(json.loads(arguments.output.read_text()))
        arguments.output.with_suffix(".md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
