"""Measure recipes through their public command, and write what was measured where it is told.

    python bench/recipes.py measure --folder DIR [--recipes NAME ...] [--budget] [--limit SECONDS]
    python bench/recipes.py measure --folder DIR --size tiny --device cpu     every part, in minutes
    python bench/recipes.py

`measure` runs recipes by `accelerate launch`, with random weights that `build` writes to DIR first
if they are not there (ContentV-8B 29 GiB, Wan 14 and 39): steps of one video on each device, an
evaluation of two prompts before and after, the export of the adapter. Another process adds up the
memory of all of the run's, by stage. A row is written when its recipe ends, and is not measured
again.

Without a word it writes the line `# Measured: ...` of each recipe that was run, the table of
docs/recipes.md, and that of docs/contentv_8b.md, which is of bench/step.py.
"""

import argparse
import atexit
import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from environment import environment, make_parser, read_rows, write_rows
from md_table import table
from recipe_run import GIB, LIMIT, NOTES, PERIOD, SAMPLING
from small_card import build_folder

from rlhf.checks import check_config
from rlhf.config import RewardGradientConfig, with_sampling
from rlhf.device import RATED_KIND, pick_device
from rlhf.generator.files import model_sizes
from rlhf.planner.search import Estimate, Planner
from rlhf.planner.text_encoders import encoder_configs

ROOT = Path(__file__).parents[1]
RECIPES, RUN = ROOT / "configs", ROOT / "bench" / "recipe_run.py"
RESULT, ROWS, AGAIN = (ROOT / "bench" / "results" / f"{name}.json" for name in ("step", "recipes", "recipes_again"))
GUIDE, PAGE = (ROOT / "docs" / name for name in ("contentv_8b.md", "recipes.md"))
COSTS = {  # what a row says: arm, frames, frames that are scored, denoising steps
    "33 frames, the first scored, no recomputation, compiled": ("exact, nothing twice, compiled", 33, 1, 25),
    "33 frames, all scored, on 24 GiB (`contentv_8b_24gib.yaml`)": ("24 GiB", 33, 33, 25),
    "33 frames, the first scored, VideoX-Fun's step": ("peers' way", 33, 1, 25),
    "125 frames, all scored (`contentv_8b_all_frames.yaml`)": ("exact, compiled", 125, 125, 25),
    "125 frames, the first scored, VideoX-Fun's step": ("peers' way", 125, 1, 25),
}
PLACE = r"(<!-- {0} -->\n).*?(<!-- end of {0} -->)"
SHARED_BELOW = 4 * 2**20  # KiB: of a larger process all pages count as its own, for telling takes too long
LINE = re.compile(r"^# Measured: .*$", re.MULTILINE)
MODELS = {"contentv_8b": "full", "wan21_t2v_1_3b": "wan 1.3B", "wan21_t2v_14b": "wan 14B"}  # of `small_card.SIZES`
HPS = "hps_v2_1"
RANDOM = {"motion_degree": {"temperature": 10.0}}  # random flow is so long that the score's gradient would round to 0
SHORT_RUN = {"gradient_accumulation_steps": 1, "num_eval_prompts": 2, "num_diversity_prompts": 0, "report_to": []}
SMALL_VIDEO = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 8, "max_sequence_length": 16}
NO_REWARDS = dict.fromkeys(("reward_kwargs", "reward_weights", "reward_caps", "eval_reward_funcs"))
OTHER_SECONDS, COMPILING_SECONDS = 90, 45  # what a run takes besides sampling and steps, supposed


def parse_measure_args(argv: list[str]) -> argparse.Namespace:
    """Return the flags of `measure`."""
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder of the models with random weights")
    parser.add_argument("--recipes", nargs="+", default=names(), help="files of configs/ (default: all for full size)")
    size = "full: the recipe; fifth: its model with a fifth of the layers, on small videos; tiny: all of it tiny"
    parser.add_argument("--size", choices=["full", "fifth", "tiny"], default="full", help=size)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps; 1 + rollout_reuse if these are more")
    parser.add_argument("--eval_frames", type=int, default=33, help="most frames of an evaluation's videos")
    parser.add_argument("--limit_gib", type=float, default=0.0, help="device memory, with the context's (default: all)")
    parser.add_argument("--host_limit_gb", type=float, default=0.0, help="host memory, in 10^9 bytes (default: all)")
    parser.add_argument("--limit", type=float, help="seconds; no run begins that would not end within them")
    parser.add_argument("--budget", action="store_true", help="print the predicted seconds alone")
    parser.add_argument("--device", help="kind of device (default: what the machine has)")
    parser.add_argument("--output", type=Path, default=ROWS, help="JSON file, which is extended")
    return parser.parse_args(argv)


def names() -> list[str]:
    """Return the recipes for models of full size."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem.startswith(tuple(MODELS)))


def devices_needed(recipe: str) -> int:
    """Return the number of devices in the command of a recipe's head."""
    text = (RECIPES / f"{recipe}.yaml").read_text()
    if launch_file := re.search(r"^#   accelerate launch --config_file (\S+)", text, re.MULTILINE):
        text = f"--num_processes {yaml.safe_load((ROOT / launch_file[1]).read_text())['num_processes']}"
    found = re.search(r"--num_processes (\d+)", text)
    return int(found[1]) if found else 1


def can_run(recipe: str, device: torch.device) -> bool:
    """Return whether this machine has a recipe's devices."""
    there = torch.accelerator.device_count() if device.type != "cpu" else os.cpu_count()
    return devices_needed(recipe) <= there and (not recipe.endswith("_npu") or recipe.endswith(device.type))


def model_folder(folder: Path, recipe: str, size: str) -> tuple[Path, str]:
    """Return where a recipe's model is, and its name in `SIZES`."""
    name = next(name for start, name in MODELS.items() if recipe.startswith(start))
    if size == "tiny":
        name = "tiny" if name == "full" else "wan tiny"
    return (folder / size / name.replace(" ", "_")).resolve(), name


def build(argv: list[str]) -> int:
    """Write the recipes' models and the file of HPS v2.1, if they are not there; return 0."""
    args = parse_measure_args(argv)
    device = pick_device(args.device)
    with locked(args.folder):
        for model, name in (model_folder(args.folder, recipe, args.size) for recipe in args.recipes):
            if not (model / "model_index.json").is_file():
                build_folder(model, name, device, 5 if args.size == "fifth" else 1)
        if args.size != "tiny" and not (args.folder / "hps.pt").is_file():
            from rewards.models.hps import random_open_clip

            with torch.device(device):
                state = random_open_clip().half().cpu().state_dict()  # as published
            torch.save({"state_dict": state}, args.folder / "hps.pt")
    return 0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made, against other runs of this command."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def changed_settings(recipe: dict, args: argparse.Namespace) -> dict:
    """Return the settings in which a run differs from its recipe, but for paths; None: left out."""
    changed = SHORT_RUN | {"max_steps": max(args.steps, recipe.get("rollout_reuse", 0) + 1)}
    if recipe.get("calibrate_rewards"):
        changed["calibrate_rewards"] = 2 if args.steps > 1 else 0
    if args.size != "full":
        changed |= SMALL_VIDEO | NO_REWARDS | {"reward_funcs": ["flicker"]}
    elif recipe["num_frames"] > args.eval_frames:
        changed["eval_size"] = {"num_frames": args.eval_frames}
    if args.size == "fifth":
        one_frame = {"frames": "all", "num_frames": 1}
        changed |= {"reward_funcs": [HPS], "reward_kwargs": {HPS: one_frame}, "dtype": "bfloat16"}
    return changed | ({"device": args.device} if args.device else {})


def with_random_rewards(settings: dict, folder: Path) -> dict:
    """Return settings with random rewards: HPS v2.1 of the folder's file, others are built."""
    kwargs, changed = dict(settings.get("reward_kwargs") or {}), {}
    for key in ("reward_funcs", "eval_reward_funcs"):
        rewards = settings.get(key) or []
        changed[key] = [name if name == HPS else f"{name}={RUN}:RandomWeights" for name in rewards]
        for name in rewards:
            source = {"checkpoint": str(folder / "hps.pt")} if name == HPS else {"reward": name}
            kwargs[name] = kwargs.get(name, {}) | source | RANDOM.get(name, {})
    return settings | changed | {"reward_kwargs": kwargs}


def predict(settings: dict, processes: int, kind: str) -> Estimate:
    """Return what the planner says of a run."""
    args = RewardGradientConfig(**settings)
    card = model_sizes(args.model)
    args = with_sampling(check_config(args, planned_processes=processes), card["sampling"])
    return Planner(args, card, encoders=encoder_configs(args.model), processes=processes, kind=kind).estimate()


def predicted_seconds(settings: dict, estimate: Estimate) -> float:
    """Return the seconds of a run, with its evaluations, by the planner's of a step."""
    share = (settings.get("eval_size") or settings)["num_frames"] / settings["num_frames"]
    sampled = 2 * settings["num_eval_prompts"] * share + settings.get("calibrate_rewards", 0)
    compiling = COMPILING_SECONDS * settings.get("compile_blocks", False)
    return OTHER_SECONDS + compiling + (settings["max_steps"] + sampled) * estimate.step_seconds


def limit_host(command: list[str], gb: float) -> tuple[list[str], str | None]:
    """Return the command under a limit of host memory, and what holds it; None for no limit."""
    if not gb:
        return command, None
    size, root = str(int(gb * 1e9)), Path("/sys/fs/cgroup")
    for parent, file in ((root, "memory.max"), (root / "memory", "memory.limit_in_bytes")):
        limit = parent / f"recipe-{os.getpid()}" / file
        try:
            if (enabled := parent / "cgroup.subtree_control").exists():
                enabled.write_text("+memory")
            if (parent / "cgroup.procs").exists():  # no other folder
                if not limit.parent.exists():
                    limit.parent.mkdir()
                    atexit.register(limit.parent.rmdir)
                limit.write_text(size)
                enter = f'echo $$ > {limit.parent}/cgroup.procs && exec "$@"'
                return ["sh", "-c", enter, "sh", *command], f"cgroup, {file}"
        except OSError:  # not ours to write
            continue
    enter = f'ulimit -d {int(size) // 1024} && exec "$@"'
    return ["sh", "-c", enter, "sh", *command], "ulimit -d, which does not count pinned memory"


def measure(recipe: str, settings: dict, args: argparse.Namespace, processes: int, kind: str) -> dict:
    """Run a recipe and its export; return their memory and seconds, by stage and in all."""
    with tempfile.TemporaryDirectory() as scratch:
        output, notes, config = (Path(scratch) / name for name in ("run", "notes.jsonl", f"{recipe}.yaml"))
        config.write_text(yaml.safe_dump(settings | {"output_dir": str(output)}))
        devices = ["--cpu"] if kind == "cpu" else ["--multi_gpu"] * (processes > 1)
        if kind == "cpu" and processes > 1:
            devices = ["--config_file", str(RECIPES / "accelerate" / f"cpu_{processes}.yaml")]
        launch = ["accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1", *devices]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no", str(RUN), "--config", str(config)]
        export = ["rlhf.export", str(output), "--adapter", str(Path(scratch) / "adapter")]
        variables = os.environ | {NOTES: str(notes), LIMIT: str(args.limit_gib)}
        samples, begins = [], []
        for module in (launch, export):
            command, held_by = limit_host([sys.executable, "-m", *module], args.host_limit_gb)
            begins.append(time.time())
            run = subprocess.Popen(command, cwd=ROOT, env=variables)
            while run.poll() is None:
                samples.append((time.time(), *tree_memory(run.pid)))
                time.sleep(PERIOD)
            if run.returncode:
                raise RuntimeError(f"{recipe}: {module[0]} ended with status {run.returncode}; its messages are above")
        noted = [json.loads(line) for line in notes.read_text().splitlines()]
        steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    *noted, end = noted
    seconds, videos = [step["seconds"] for step in steps], [step["samples"] for step in steps]
    if videos[0] != processes:
        raise RuntimeError(f"{recipe}: got {videos[0]} videos in the first step, expected one of each of {processes}")
    first = len(steps) > 1  # it compiles and pins memory
    stages = [{"stage": "launch and imports", "time": begins[0]}, *noted, {"stage": "export", "time": begins[1]}]
    return {
        "recipe": recipe,
        "devices": processes,
        "limit_gib": args.limit_gib,
        "host_limit_gb": args.host_limit_gb,
        "host_limit_by": held_by,
        "seconds_a_video": sum(seconds[first:]) / (videos[-1] - videos[0] * first),
        "seconds_a_step": seconds,
        "start_seconds": next(note["time"] for note in noted if note["stage"] == SAMPLING) - begins[0],
        "device_gib": max(end["allocated_gib"], *(step["memory_gib"] for step in steps)),
        "driver_gib": end["driver_gib"],
        "host_anonymous_gib": max(anonymous for _, anonymous, _ in samples) / GIB,
        "host_gib": max(total for *_, total in samples) / GIB,
        "stages": by_stage(stages, samples),
    }


def by_stage(begins: list[dict], samples: list[tuple]) -> list[dict]:
    """Return each stage's seconds and peaks of host memory, calls of one stage in a row as one."""
    begins = [b for i, b in enumerate(begins) if i == 0 or b["stage"] != begins[i - 1]["stage"]]
    ends = [*(begin["time"] for begin in begins[1:]), samples[-1][0] + PERIOD]
    found = []
    for begin, end in zip(begins, ends, strict=True):
        inside = [sample for sample in samples if begin["time"] <= sample[0] < end]
        anonymous, total = (max((sample[i] for sample in inside), default=0) / GIB for i in (1, 2))
        stage = {"stage": begin["stage"], "seconds": end - begin["time"]}
        found.append(stage | {"anonymous_gib": anonymous, "total_gib": total})
    return found


def proc_fields(path: Path) -> dict[str, int]:
    """Return the fields of a file of /proc that begin with a number; sizes are in KiB."""
    found = re.findall(r"^(\w+):[ \t]+(\d+)", path.read_text(), re.MULTILINE)
    return {name: int(value) for name, value in found}


def tree_memory(root: int) -> tuple[int, int]:
    """Return the anonymous and the total bytes of a process and all that it started.

    Anonymous: what cannot be read again from a file. Total: with the pages of mapped files. Pages
    that small processes share, such as a compiler's workers, count once.
    """
    parents, sizes = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = proc_fields(folder / "status")
                kib = [fields.get(name, 0) for name in ("RssAnon", "RssShmem", "RssFile")]
                if sum(kib) < SHARED_BELOW:  # here a page of n processes counts as 1/n
                    rollup = proc_fields(folder / "smaps_rollup")
                    kib = [rollup.get(name, 0) for name in ("Pss_Anon", "Pss_Shmem", "Pss_File")]
            except OSError:  # it has ended
                continue
            pid = int(folder.name)
            parents[pid], sizes[pid] = fields["PPid"], (1024 * (kib[0] + kib[1]), 1024 * sum(kib))
    tree, found = {root}, -1
    while found != len(tree):
        found = len(tree)
        tree |= {pid for pid, parent in parents.items() if parent in tree}
    return tuple(sum(sizes[pid][i] for pid in tree if pid in sizes) for i in (0, 1))


def measure_recipes(argv: list[str]) -> int:
    """Measure each recipe that the result file does not have yet; return the exit status."""
    args, began, failed = parse_measure_args(argv), time.monotonic(), False
    if args.size != "full" and args.output == ROWS:
        raise SystemExit(
            f"--output: got {ROWS.name}, which is of full size, with --size {args.size}; name another file"
        )
    device = pick_device(args.device)
    about = environment(device) | {"size": args.size}
    cores = about.pop("cores")  # machines of one device may have other numbers
    key = lambda row: tuple(row[name] for name in ("recipe", "limit_gib", "host_limit_gb"))
    for recipe in args.recipes:
        rows, wanted = read_rows(args.output, about, key), (recipe, args.limit_gib, args.host_limit_gb)
        if wanted in rows or not can_run(recipe, device):
            print(f"{recipe}: {told(rows[wanted], about) if wanted in rows else not_run(recipe)}", flush=True)
            continue
        of_recipe, processes = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text()), devices_needed(recipe)
        changed = changed_settings(of_recipe, args)
        settings = {name: value for name, value in (of_recipe | changed).items() if value is not None}
        settings["base_dir"] = str(RECIPES)
        if not args.budget:
            flags = ["--folder", args.folder, "--size", args.size, "--recipes", recipe]
            flags += ["--device", args.device] if args.device else []
            subprocess.run([sys.executable, __file__, "build", *map(str, flags)], check=True)  # it leaves no context
            settings["model"] = str(model_folder(args.folder, recipe, args.size)[0])
        estimate = predict(settings, processes, RATED_KIND if args.budget else device.type)
        seconds = predicted_seconds(settings, estimate)
        left_out = args.limit and time.monotonic() - began + seconds > args.limit
        print(f"{recipe}: {seconds:.0f} s predicted{', left out' * bool(left_out)}", flush=True)
        if left_out or args.budget:
            continue
        try:
            row = measure(recipe, with_random_rewards(settings, args.folder), args, processes, device.type)
        except RuntimeError as error:
            print(error, flush=True)
            failed = True
            continue
        row |= {
            "host_predicted_gib": estimate.host.peak_bytes / GIB * processes,
            "predicted_seconds": seconds,
            "cores": cores,
        }
        row |= {"all_seconds": sum(stage["seconds"] for stage in row["stages"]), "changed": changed}
        with locked(args.folder):
            write_rows(args.output, about, (read_rows(args.output, about, key) | {wanted: row}).values())
        print(f"{recipe}: {told(row, about)}", flush=True)
    return int(failed)


# ------------------------------------------------------------------------- what the results say


def told(row: dict, about: dict) -> str:
    """Return what a recipe's head says of a measured row."""
    devices = f"one {about['device']}" if row["devices"] == 1 else f"{row['devices']} {about['device']}"
    return (
        f"{row['seconds_a_video']:.1f} s a video, {row['device_gib']:.1f} GiB allocated, {row['driver_gib']:.1f} by "
        f"the driver on {devices}{limits_of(row)}, random weights. Host memory {row['host_gib']:.1f} GiB, "
        f"{row['host_predicted_gib']:.1f} predicted; start-up {row['start_seconds']:.0f} s."
    )


def limits_of(row: dict) -> str:
    """Return the limits of a row's run; "" for none."""
    limits = [f"{row['limit_gib']:g} GiB of the device"] * bool(row["limit_gib"])
    limits += [f"{row['host_limit_gb']:g} GB of the host"] * bool(row["host_limit_gb"])
    return f" held to {' and '.join(limits)}" * bool(limits)


def not_run(recipe: str) -> str:
    """Return why a recipe was not run."""
    devices = devices_needed(recipe)
    needs = f"it needs {devices} {'NPUs' if recipe.endswith('_npu') else 'devices'}"
    return f"not run: {needs}." if devices > 2 else "not measured."


def cost(result: dict, arm: str, frames: int, scored: int, steps: int) -> tuple[float, float, str] | None:
    """Return a video's seconds, peak GiB, and how they are known; None if they are not.

    Measured whole, or worked out of its measured parts: steps without gradient, then the last one
    with decoder, reward and the way back.
    """
    of_arm = [r for r in result.get("rows", []) if (r["arm"], r["frames"], r["scored"]) == (arm, frames, scored)]
    rows = {row["phase"]: row for row in of_arm if "seconds" in row and row.get("steps", steps) == steps}
    gib = max((row["peak_gib"] for row in rows.values()), default=0.0)
    if "step" in rows:
        return rows["step"].get("seconds_per_gradient", rows["step"]["seconds"]), gib, ""
    if {"sampling", "window"} <= rows.keys():
        return (steps - 1) * rows["sampling"]["seconds"] + rows["window"]["seconds"], gib, " (from its parts)"
    return None


def read(result: Path) -> dict:
    """Return a result file's content; {} without the file."""
    return json.loads(result.read_text()) if result.exists() else {}


def costs_table(result: dict) -> str:
    """Return the table of what trainings of COSTS take on one device."""
    device = result.get("environment", {}).get("device")
    lines = [f"One {device}, 8 videos an optimizer step:\n", "| | a video, s | GiB | 500 steps, h |"]
    lines.append("|---" * 4 + "|")
    for told, sizes in COSTS.items():
        if found := cost(result, *sizes):
            seconds, gib, how = found
            lines.append(f"| {told} | {seconds:.0f}{how} | {gib:.0f} | {seconds * 8 * 500 / 3600:.0f} |")
    return "\n".join(lines) + "\n" if len(lines) > 3 else "Not measured yet.\n"


def layouts_told(result: dict) -> str:
    """Return a paragraph about a step on two devices; "" where it was not measured."""
    rows = {row["arm"]: row for row in result.get("rows", []) if row["phase"] == "step" and "seconds" in row}
    if not {"one device", "data", "guidance", "sequence"} <= rows.keys():
        return ""
    one, data, guidance, sequence = (rows[arm] for arm in ("one device", "data", "guidance", "sequence"))
    return (
        f"\nTwo devices ({one['frames']} frames, the first scored; `bench/results/scale.json`): a video takes "
        f"{one['seconds']:.0f} s on one.\nIt takes {data['seconds']:.0f} s if each has another video. One video on "
        f"both takes {guidance['seconds']:.0f} s with a guidance branch on each, or\n"
        f"{sequence['seconds']:.0f} s with half of the tokens on each.\n"
    )


def recipes_table(result: dict, again: dict) -> str:
    """Return a row for each run of a recipe of full size, and a line that names the other recipes.

    A recipe's second run, of `again`, follows its first.
    """
    rows = {row["recipe"]: row for row in result.get("rows", [])}
    second = {row["recipe"]: row for row in again.get("rows", [])}
    headings = [
        "recipe",
        "a video, s",
        "allocated, GiB",
        "by the driver, GiB",
        "host, GiB",
        "predicted",
        "start-up, s",
    ]
    columns = ("seconds_a_video", "device_gib", "driver_gib", "host_gib", "host_predicted_gib")
    runs = [(f"`{name}.yaml`{limits_of(rows[name])}", rows[name]) for name in names() if name in rows]
    runs += [(f"{run}, again", second[row["recipe"]]) for run, row in runs if row["recipe"] in second]
    runs.sort(key=lambda run: run[0])
    lines = [
        [run, *(f"{row[column]:.1f}" if column in row else "-" for column in columns), f"{row['start_seconds']:.0f}"]
        for run, row in runs
    ]
    if not lines:
        return "No recipe was run as a whole yet.\n"
    others = [f"`{name}.yaml`" for name in names() if name not in rows]
    not_run = f"\nNot run: {', '.join(others)}.\n" if others else ""
    return f"On {result['environment']['device']}:\n\n{table(headings, lines)}{not_run}"


def write_costs(folder: Path = RECIPES, result: Path = RESULT, guide: Path = GUIDE, page: Path = PAGE) -> None:
    """Write the heads of recipes that were run or cannot be, and the tables of both pages."""
    runs = read(result.with_name(ROWS.name))
    rows = {row["recipe"]: row for row in runs.get("rows", [])}
    costs = costs_table(read(result)) + layouts_told(read(result.with_name("scale.json")))
    tables = (guide, "costs", costs), (page, "runs", recipes_table(runs, read(result.with_name(AGAIN.name))))
    for path, mark, text in tables:
        place = re.compile(PLACE.format(mark), re.DOTALL)
        write_changed(path, place.sub(lambda found, text=text: f"{found[1]}{text}{found[2]}", path.read_text()))
    for path in sorted(folder.glob("*.yaml")):
        row = rows.get(path.stem)
        if row or (path.stem in names() and devices_needed(path.stem) > 2):
            head = told(row, runs["environment"]) if row else not_run(path.stem)
            write_changed(path, LINE.sub(f"# Measured: {head}", path.read_text()))


def write_changed(path: Path, text: str) -> None:
    """Write a file whose text is another now, and say so."""
    if text != path.read_text():
        path.write_text(text)
        print(f"wrote {path.name}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["measure"], ["build"]):
        return {"measure": measure_recipes, "build": build}[argv[0]](argv[1:])
    make_parser(__doc__).parse_args(argv)
    write_costs()
    return 0


if __name__ == "__main__":
    sys.exit(main())
