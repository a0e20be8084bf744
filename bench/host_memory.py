"""Host memory and start-up of a recipe through its public command, on a model of random weights.

    python bench/host_memory.py --folder DIR --recipes contentv_8b_24gib contentv_8b_all_frames
    python bench/host_memory.py --folder DIR --size tiny --device cpu       every part, in a minute

DIR gets a model in the published layout and an HPS v2.1 file, if they are not there: 31 GiB. Each
recipe runs by `accelerate launch` for `--steps` steps without evaluation; at full size, once more
with an evaluation of two prompts. Another process adds up the memory of all of the run's, by stage.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import torch
from environment import environment, make_parser, read_rows, show_row, write_rows
from small_card import build_folder

from rlhf.config.parse import parse_command
from rlhf.device import pick_device, total_memory
from rlhf.planner.search import Planner
from rlhf.planner.text_encoders import encoder_configs

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "host_memory.json"
GIB, PERIOD = 2**30, 0.02
MARKS = "HOST_MEMORY_MARKS"  # variable with the file that a run writes its stages to
FIFTH = {"transformer": 8, "text_encoder": 12, "text_encoder_2": 6, "text_encoder_3": 5}  # layers
SMALL_VIDEO = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "gradient_accumulation_steps": 1}
SHORT_TEXT = {"max_sequence_length": 16}


def parse_host_memory_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command's flags."""
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder of the model with random weights")
    parser.add_argument("--recipes", nargs="+", default=["contentv_8b_24gib"], help="names of files of configs/")
    size = "full: the recipe; fifth: its model with a fifth of the layers, on small videos; tiny: all of it tiny"
    parser.add_argument("--size", choices=["full", "fifth", "tiny"], default="full", help=size)
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--limit_gib", type=float, help="device memory that PyTorch may take")
    parser.add_argument("--device", help="kind of device (default: what the machine has)")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file, which is extended")
    return parser.parse_args(argv)


def prepare(folder: Path, size: str, device: torch.device) -> None:
    """Write the model and the reward's file, if they are not there."""
    if not (folder / "model" / "model_index.json").is_file():
        build_folder(folder / "model", "tiny" if size == "tiny" else "full", device, FIFTH if size == "fifth" else None)
    if size != "tiny" and not (folder / "hps.pt").is_file():
        from rewards.models.hps import random_open_clip

        with torch.device(device):
            state = random_open_clip().half().cpu().state_dict()  # as published
        torch.save({"state_dict": state}, folder / "hps.pt")


def run_flags(folder: Path, recipe: str, args: argparse.Namespace, output: Path, evaluates: bool) -> list[str]:
    """Return the flags of `train_rlhf.py` for a row."""
    flags = {"model": folder / "model", "output_dir": output, "max_steps": args.steps, "report_to": "none"}
    flags |= {"num_eval_prompts": 2, "num_diversity_prompts": 0} if evaluates else {"eval_prompts": "none"}
    if args.size == "tiny":
        flags |= {"reward_funcs": "flicker", "reward_kwargs": "{}"}
    else:
        kwargs = {"frames": "all", "num_frames": 8 if args.size == "full" else 1, "checkpoint": str(folder / "hps.pt")}
        flags |= {"reward_funcs": "hps_v2_1", "reward_kwargs": json.dumps({"hps_v2_1": kwargs})}
    if args.size != "full":
        flags |= SMALL_VIDEO | SHORT_TEXT
    if args.device:
        flags["device"] = args.device
    if args.size != "tiny":
        flags["dtype"] = "bfloat16"
    command = ["--config", str(ROOT / "configs" / f"{recipe}.yaml")]
    return [*command, *(text for name, value in flags.items() for text in (f"--{name}", str(value)))]


def measure(folder: Path, recipe: str, args: argparse.Namespace, device: torch.device, evaluates: bool) -> dict:
    """Run a recipe; return its memory and seconds by stage, and what the planner says of it."""
    with tempfile.TemporaryDirectory() as scratch:
        output, marks = Path(scratch) / "run", Path(scratch) / "marks.jsonl"
        flags = run_flags(folder, recipe, args, output, evaluates)
        variables = {MARKS: str(marks), "LIMIT_GIB": str(args.limit_gib or "")}
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
        command += ["--cpu"] * (device.type == "cpu") + [str(Path(__file__).resolve()), *flags]
        start = time.time()
        run = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables)
        samples = []
        while run.poll() is None:
            samples.append((time.time(), *tree_memory(run.pid)))
            time.sleep(PERIOD)
        if run.returncode:
            raise SystemExit(f"{recipe}: the run ended with status {run.returncode}; its messages are above")
        rows = [json.loads(line) for line in marks.read_text().splitlines()]
        steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    stages = by_stage(rows, samples, start)
    return {
        "recipe": recipe,
        "evaluates": evaluates,
        "steps": args.steps,
        "limit_gib": args.limit_gib,
        "first_step_after_seconds": next(row["time"] for row in rows if row["stage"] == "step") - start,
        "peak_anonymous_gib": max(anonymous for _, anonymous, _ in samples) / GIB,
        "peak_total_gib": max(total for *_, total in samples) / GIB,
        "predicted_gib": predict(flags, device) / GIB,
        "stages": stages,
        "seconds_a_step": [step["seconds"] for step in steps],
        "device_gib": max(step["memory_gib"] for step in steps),
        "driver_gib": rows[-1]["driver_gib"],
    }


def by_stage(marks: list[dict], samples: list[tuple], start: float) -> list[dict]:
    """Return each stage's seconds and peaks; the first is all before the first mark."""
    begins = [{"stage": "launch and imports", "time": start}, *marks]
    ends = [*(mark["time"] for mark in marks), samples[-1][0] + PERIOD]
    found = []
    for mark, end in zip(begins, ends, strict=True):
        inside = [sample for sample in samples if mark["time"] <= sample[0] < end]
        peak = lambda i, inside=inside: max((sample[i] for sample in inside), default=0) / GIB
        found.append(
            {"stage": mark["stage"], "seconds": end - mark["time"], "anonymous_gib": peak(1), "total_gib": peak(2)}
        )
    return found


def tree_memory(root: int) -> tuple[int, int]:
    """Return the anonymous and the total bytes of a process and all that it started.

    Anonymous: what cannot be read again from a file. Total: with the pages of mapped files.
    """
    parents, sizes = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            except OSError:  # it has ended
                continue
            kib = [int(fields.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssShmem", "RssFile")]
            pid = int(folder.name)
            parents[pid], sizes[pid] = int(fields["PPid"]), (1024 * (kib[0] + kib[1]), 1024 * sum(kib))
    tree, found = {root}, -1
    while found != len(tree):
        found = len(tree)
        tree |= {pid for pid, parent in parents.items() if parent in tree}
    return tuple(sum(sizes[pid][i] for pid in tree if pid in sizes) for i in (0, 1))


def predict(flags: list[str], device: torch.device) -> int:
    """Return the bytes of host memory that the planner expects."""
    from rlhf.checks import check_config
    from rlhf.config import with_sampling
    from rlhf.generator.files import model_sizes

    args, _ = parse_command(flags, None)
    card = model_sizes(args.model)
    args = with_sampling(check_config(args), card["sampling"])
    return Planner(args, card, encoders=encoder_configs(args.model), kind=device.type).estimate().host.peak_bytes


# --------------------------------------------------------------------- inside of the measured run


def run_marked() -> int:
    """Run `train_rlhf.py` with this process's flags, and write when each stage begins."""
    import rlhf.training.rewards
    import rlhf.training.setup as setup
    from rlhf import train

    if limit := os.environ["LIMIT_GIB"]:
        device = pick_device()
        allowed = (float(limit) * GIB) / total_memory(device)
        torch.get_device_module(device).set_per_process_memory_fraction(allowed)
    _mark(rlhf.training.rewards, "open_rewards", "rewards")
    _mark(setup, "find_base", "trainer")
    _mark(setup, "encode", "text encoders")
    _mark(setup, "load_base", "transformer and VAE")
    _mark(setup, "prepare_model", "adapter and blocks")
    _mark(setup, "make_fields", "rest of the set-up")
    from rlhf.trainer import RewardGradientTrainer

    _mark(RewardGradientTrainer, "train", "before the first step")
    _mark(RewardGradientTrainer, "step", "step")
    _mark(RewardGradientTrainer, "_evaluate_or_sample", "after the step")
    return train.main()


def _mark(owner: object, name: str, stage: str) -> None:
    """Have a function write that its stage begins."""
    function: Callable = getattr(owner, name)

    @wraps(function)
    def marked(*args, **kwargs):
        mark = {"stage": stage, "time": time.time(), "driver_gib": _driver_bytes() / GIB}
        with Path(os.environ[MARKS]).open("a") as file:
            file.write(json.dumps(mark) + "\n")
        return function(*args, **kwargs)

    setattr(owner, name, marked)


def _driver_bytes() -> int:
    """Return the bytes in use on the device, as its driver counts them; 0 on a CPU."""
    if not torch.accelerator.is_available():
        return 0
    free, total = torch.get_device_module().mem_get_info()
    return total - free


def main(argv: list[str] | None = None) -> None:
    """Measure each recipe that the result file does not have yet."""
    args = parse_host_memory_args(argv)
    device = pick_device(args.device)
    prepare(args.folder, args.size, device)
    about = environment(device) | {"size": args.size}
    key = lambda row: (row["recipe"], row["evaluates"], row["steps"], row["limit_gib"])
    rows = read_rows(args.output, about, key)
    for recipe in args.recipes:
        for evaluates in (False, True)[: 1 + (args.size == "full")]:
            if (wanted := (recipe, evaluates, args.steps, args.limit_gib)) not in rows:
                rows[wanted] = measure(args.folder, recipe, args, device, evaluates)
                write_rows(args.output, about, rows.values())
            show_row(rows[wanted])


if __name__ == "__main__":
    sys.exit(run_marked() if MARKS in os.environ else main())
