"""Studies on nano: each arm is timed alone on a device, then trained with every seed.

bench/study.py, methods.py and cheaper.py each have arms, settings of runs by name, and a result
file. After each run the file is written anew, whole or not at all: a stopped study goes on with the
same command, and a run that failed says why and is made again next time.
"""

import argparse
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import study_runs
from environment import environment
from study_arms import cost_key
from study_runs import Conditions

from rlhf.device import pick_device
from rlhf.distributed.accelerator import available_cores
from rlhf.io import write_json

EVAL_SEED = 11  # prompts on which no recipe was chosen


@dataclass(frozen=True)
class Pools:
    """Processes that work on the devices (none: on the CPU)."""

    devices: list[int]
    jobs: int  # at a time on each device

    def timers(self) -> list[ProcessPoolExecutor]:
        """For each device one process, alone on it."""
        if not self.devices:
            return [self._open(1, [], 1)]
        return [self._open(1, [device], len(self.devices)) for device in self.devices]

    def workers(self) -> ProcessPoolExecutor:
        """Return the pool of processes."""
        count = self.jobs * max(1, len(self.devices))
        return self._open(count, self.devices, count)

    def _open(self, count: int, devices: list[int], at_once: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # a fork can't use an opened accelerator
        threads = max(1, available_cores() // at_once)
        start = partial(study_runs.start_worker, context.Value("i", 0), devices, threads)
        return ProcessPoolExecutor(count, context, start)


class Study:
    """A result file, and the processes that fill it."""

    def __init__(self, path: Path, conditions: Conditions, steps: int, timed: int, pools: Pools, default: dict):
        self.path, self.conditions, self.pools = path, conditions, pools
        self.steps, self.timed = steps, timed
        self.default = default  # settings of the arm whose steps are the budget
        device, self.began = pick_device(conditions.device), time.perf_counter()
        kept = json.loads(path.read_text()) if path.exists() else {"environment": {}, "rows": []}
        self.about, self.rows = kept["environment"], kept["rows"]
        now = {"config": "configs/nano.yaml", "steps": steps, "flags": list(conditions.flags)}
        now |= {"eval_seed": conditions.eval_seed, "eval_prompts": conditions.eval_prompts}
        changed = [key for key in now if self.rows and self.about.get(key) != now[key]]
        if changed:
            raise SystemExit(
                f"{path} has rows made with other {', '.join(changed)}, expected the same to go on with them; "
                "give those again, or another --output"
            )
        self.about |= environment(device) | now
        self.took = self.about.get("wall_seconds", 0.0)  # by earlier calls
        self.costs = self.about.setdefault("seconds_per_step", {})

    def calibrate(self, all_settings: list[dict], with_samples: bool = False) -> None:
        """Time the arms that have no time yet, one after the other on each device."""
        alone, timers = replace(self.conditions, threads=None), self.pools.timers()
        self.about["base"] = timers[0].submit(study_runs.evaluate_base, alone).result()
        todo = {cost_key(settings): settings for settings in [self.default, *all_settings]}
        todo = 2 * [(key, settings) for key, settings in todo.items() if key not in self.costs]
        for first in range(0, len(todo), len(timers)):
            self._time(todo[first : first + len(timers)], timers, alone)
        if with_samples and "seconds_per_sample" not in self.about:
            job = timers[0].submit(study_runs.seconds_per_sample, self.timed, alone)
            self.about["seconds_per_sample"] = job.result()
        for timer in timers:
            timer.shutdown()
        self.about["budget_seconds"] = self.steps * self.costs[cost_key(self.default)]
        self.write()

    def _time(self, some: list[tuple[str, dict]], timers: list[ProcessPoolExecutor], alone: Conditions) -> None:
        task = study_runs.seconds_per_step
        pairs = zip(some, timers, strict=False)
        jobs = [timer.submit(task, settings, self.timed, alone) for (_, settings), timer in pairs]
        for (key, _), job in zip(some, jobs, strict=True):
            try:
                self.costs[key] = min(job.result(), self.costs.get(key, math.inf))
                print(f"a step: {job.result():.3f} s with {key}", flush=True)
            except Exception as error:  # its runs will say so; the others go on
                print(f"could not time {key}: {type(error).__name__}: {error}", flush=True)
        self.write()

    def steps_of(self, settings: dict) -> int:
        """Return the steps that the budget allows."""
        return max(1, round(self.about["budget_seconds"] / self.costs[cost_key(settings)]))

    def is_done(self, about: dict) -> bool:
        """Return whether the result has the row, without an error."""
        same = lambda row: all(row.get(key) == value for key, value in about.items())
        return any(same(row) and "error" not in row for row in self.rows)

    def run(self, tasks: list[tuple[dict, Callable]]) -> None:
        """All tasks that are not done, each (what tells its row from others, what makes it)."""
        todo = [(about, task) for about, task in tasks if not self.is_done(about)]
        arms = [*self.about.get("arms", []), *(about["arm"] for about, _ in tasks)]
        self.about["arms"] = [*dict.fromkeys(arms)]
        minutes = len(todo) * self.about["budget_seconds"] / 60
        done = len(tasks) - len(todo)
        print(f"{len(todo)} runs to make, {minutes:.0f} minutes one by one; {done} done", flush=True)
        with self.pools.workers() as pool:
            running = {pool.submit(study_runs.guarded, task, about): about for about, task in todo}
            for number, job in enumerate(as_completed(running), 1):
                about = running[job]
                rows = [about | row for row in job.result()]
                for row in rows:
                    self.put(row)
                what = ", ".join(f"{key} {value}" for key, value in about.items() if key != "settings")
                print(f"{number}/{len(todo)}: {what}: {told(rows[-1])}", flush=True)

    def put(self, row: dict) -> None:
        """Add a row, in place of an earlier one of the same arm, seed and variant."""
        keys = "arm", "seed", "variant"
        same = lambda other: all(other.get(key) == row.get(key) for key in keys)
        self.rows = [other for other in self.rows if not same(other)] + [row]
        self.write()

    def write(self) -> None:
        """Write the result file."""
        self.about["wall_seconds"] = self.took + time.perf_counter() - self.began
        write_json(self.path, {"environment": self.about, "rows": self.rows}, indent=1)


def told(row: dict) -> str:
    """Return a line about a row."""
    if "error" in row:
        return row["error"]
    gains = ", ".join(f"{name} {row[name]['diff']:+.3f}" for name in ("trained", "verifier") if name in row)
    return f"{row['steps']} steps, {gains}"


def run_of(study: Study, about: dict, settings: dict, steps: int | None = None) -> tuple[dict, Callable]:
    """Return the task that trains an arm for `steps`, or as many as the budget allows."""
    if cost_key(settings) not in study.costs:
        return about, study_runs.not_timed
    seconds, steps = study.costs[cost_key(settings)], steps or study.steps_of(settings)
    about = about | {"settings": settings, "steps": steps, "device_seconds": steps * seconds}
    return about, partial(study_runs.train, settings, about["seed"], steps, study.conditions)


@contextmanager
def opened(
    given: argparse.Namespace, path: Path, default: dict, eval_seed: int = EVAL_SEED, diversity: bool = True, flags=()
) -> Iterator[Study]:
    """Return the study of a result file, as the command says. flags: of train_rlhf.py."""
    device = pick_device(given.device)
    on_cpu = device.type == "cpu"
    pools = Pools([] if on_cpu else given.devices, given.jobs or (1 if on_cpu else 6))
    with tempfile.TemporaryDirectory() as work:
        conditions = Conditions(
            device.type,
            Path(work),
            eval_seed,
            given.eval_prompts,
            given.eval_prompts if diversity else 0,
            16 if on_cpu else 64,
            max(1, available_cores() // pools.jobs) if on_cpu else None,
            (*flags, *given.flags),
        )
        yield Study(given.output or path, conditions, given.steps, given.timed, pools, default)


def arguments(about: str, arms: list[str], steps: int) -> argparse.ArgumentParser:
    """Return a parser with the flags of every study."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--only", nargs="+", default=arms, choices=arms, metavar="ARM", help=f"of {', '.join(arms)}")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument(
        "--steps", type=int, default=steps, help="the budget, in steps of the default arm (%(default)s)"
    )
    parser.add_argument("--timed", type=int, default=8, help="steps by which an arm is timed (default: %(default)s)")
    parser.add_argument("--device", help="kind of device; default: the accelerator of this machine")
    parser.add_argument("--devices", type=int, nargs="+", default=[0], help="which of them (default: 0)")
    parser.add_argument("--jobs", type=int, help="runs at a time on a device; default: 1 on a CPU, else 6")
    parser.add_argument("--eval_prompts", type=int, default=128, help="held-out prompts (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="the result's file")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of train_rlhf.py, last")
    return parser
