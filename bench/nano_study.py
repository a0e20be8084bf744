"""Studies on nano: each arm is timed alone on a device, then trained with every seed.

bench/study.py, methods.py and cheaper.py each have arms, settings of runs by name, and a result
file. After each run the file is written anew, whole or not at all: a stopped study goes on with the
same command, also on another machine with the same kind of device, and a run that failed says why
and is made again next time. With --limit no run begins that would not end in time.

Seconds of a step are those of the machine that timed the default arm first. An arm that is timed
elsewhere is timed beside the default arm, and its seconds are scaled by that arm's.
"""

import argparse
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
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

EVAL_SEED = 11  # prompts on which only rates and the scale of long runs were chosen
COSTS = "seconds_per_step"  # of the result's environment: by `cost_key`
SLOWER = 0.16  # by how much each run beside it makes a run slower, until one ended: ten took 2.4 times as long as one
START_SECONDS = 20  # of a run, apart from its steps
BASE_TOLERANCE = 0.02  # of mean scores of the base: one or two of 128 videos, as devices round differently


@dataclass(frozen=True)
class Pools:
    """Processes that work on the devices (none: on the CPU)."""

    devices: list[int]
    jobs: int  # at a time on each device

    @property
    def count(self) -> int:
        """Return how many runs there are at a time."""
        return self.jobs * max(1, len(self.devices))

    def timers(self) -> list[ProcessPoolExecutor]:
        """For each device one process, alone on it."""
        if not self.devices:
            return [self._open(1, [], 1)]
        return [self._open(1, [device], len(self.devices)) for device in self.devices]

    def workers(self) -> ProcessPoolExecutor:
        """Return the pool of processes."""
        return self._open(self.count, self.devices, self.count)

    def _open(self, count: int, devices: list[int], at_once: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # a fork can't use an opened accelerator
        threads = max(1, available_cores() // at_once)
        start = partial(study_runs.start_worker, context.Value("i", 0), devices, threads)
        return ProcessPoolExecutor(count, context, start)


class Study:
    """A result file, and the processes that fill it."""

    def __init__(
        self,
        path: Path,
        conditions: Conditions,
        steps: int,
        timed: int,
        pools: Pools,
        default: dict,
        limit: float = math.inf,
        costs_of: Path | None = None,
        slower: float = SLOWER,
    ):
        self.path, self.conditions, self.pools = path, conditions, pools
        self.steps, self.timed, self.limit = steps, timed, limit
        self.default = default  # settings of the arm whose steps are the budget
        self.began, self.slower = time.perf_counter(), 1 + slower * (pools.jobs - 1)
        kept = json.loads(path.read_text()) if path.exists() else {"environment": {}, "rows": []}
        self.about, self.rows = kept["environment"], kept["rows"]
        self.machine = environment(pick_device(conditions.device))
        now = {"config": "configs/nano.yaml", "steps": steps, "flags": list(conditions.flags)}
        now |= {"eval_seed": conditions.eval_seed, "eval_prompts": conditions.eval_prompts}
        self._require_same(path, self.about if self.rows else {}, now | {"device": self.machine["device"]})
        self.about = self.about if COSTS in self.about else self.about | self.machine
        self.about |= now
        self.took = self.about.get("wall_seconds", 0.0)  # by earlier calls
        if costs_of and COSTS not in self.about:
            other = json.loads(costs_of.read_text())["environment"]
            self._require_same(costs_of, other, {"device": self.machine["device"]})
            self.about |= {key: other[key] for key in (*self.machine, COSTS, "seconds_per_sample") if key in other}
        self.costs = self.about.setdefault(COSTS, {})

    @staticmethod
    def _require_same(path: Path, kept: dict, now: dict) -> None:
        """Raise SystemExit if what is kept in a file was made under other conditions."""
        if changed := [key for key in now if kept and kept.get(key) != now[key]]:
            got = ", ".join(f"{key} {kept.get(key)} (now {now[key]})" for key in changed)
            raise SystemExit(
                f"{path} has rows made with other {', '.join(changed)}: {got}; expected the same to go on with them; "
                "give those again, or another --output"
            )

    def calibrate(self, all_settings: list[dict], with_samples: bool = False) -> None:
        """Time the arms that have no time yet, one after the other on each device."""
        alone, timers = replace(self.conditions, threads=None), self.pools.timers()
        self._put_base(timers[0].submit(study_runs.evaluate_base, alone).result())
        default, todo = cost_key(self.default), {cost_key(settings): settings for settings in all_settings}
        todo = {key: settings for key, settings in todo.items() if key not in self.costs}
        if todo or default not in self.costs:
            self._time({default: self.default} | todo, timers, alone)
        if with_samples and "seconds_per_sample" not in self.about:
            job = timers[0].submit(study_runs.seconds_per_sample, self.timed, alone)
            self.about["seconds_per_sample"] = job.result()
        for timer in timers:
            timer.shutdown()
        self.about["budget_seconds"] = self.steps * self.costs[default]
        self.write()

    def _put_base(self, means: dict[str, float]) -> None:
        """Keep the base's means. Raise SystemExit if those of the file's rows are others."""
        kept = self.about.get("base", {}) if self.rows else {}
        if far := [name for name in kept if abs(means.get(name, math.inf) - kept[name]) > BASE_TOLERANCE]:
            got = ", ".join(f"{name} {means.get(name)} (then {kept[name]})" for name in far)
            raise SystemExit(f"{self.path}: the base has {got}; its rows are of other judges, so give another --output")
        self.about["base"] = kept or means

    def _time(self, todo: dict[str, dict], timers: list[ProcessPoolExecutor], alone: Conditions) -> None:
        """Time steps twice and keep the faster time; the first of todo is the default arm's."""
        found, (default, *_), twice = {}, todo, [*todo.items()] * 2
        for first in range(0, len(twice), len(timers)):
            part = twice[first : first + len(timers)]
            pairs = zip(part, timers, strict=False)
            jobs = [timer.submit(study_runs.seconds_per_step, given, self.timed, alone) for (_, given), timer in pairs]
            for (key, _), job in zip(part, jobs, strict=True):
                try:
                    found[key] = min(job.result(), found.get(key, math.inf))
                    print(f"a step: {job.result():.3f} s with {key}", flush=True)
                except Exception as error:  # its runs will say so; the others go on
                    print(f"could not time {key}: {type(error).__name__}: {error}", flush=True)
        if default not in found:
            raise SystemExit(f"the default arm could not be timed, and its time is the budget: {default}")
        scale = self.costs.get(default, found[default]) / found[default]
        if default in self.costs:
            self.about.setdefault("timed_later", []).append(self.machine | {"scale": scale, "arms": [*found][1:]})
            print(f"times are scaled by {scale:.3f}, to those of the machine that timed the default arm first")
        self.costs |= {key: scale * seconds for key, seconds in found.items() if key not in self.costs}
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
        running = {}
        with self.pools.workers() as pool:
            while True:
                while len(running) < self.pools.count and (place := self._next(todo)) is not None:
                    about, task = todo.pop(place)
                    running[pool.submit(study_runs.guarded, task, about)] = about, time.perf_counter()
                if not running:
                    break
                for job in wait(running, return_when=FIRST_COMPLETED).done:
                    self._take(job.result(), *running.pop(job), len(todo) + len(running))
        if todo:
            print(f"{len(todo)} runs are left, which would not have ended in {self.limit:.0f} s", flush=True)

    def _seconds(self, about: dict) -> float:
        """Return the seconds of a run beside others, alone on the device if none was measured."""
        return START_SECONDS + self.slower * about.get("device_seconds", self.about["budget_seconds"])

    def _next(self, todo: list[tuple[dict, Callable]]) -> int | None:
        """Return the place of the first run that will end within the limit."""
        left = self.limit - (time.perf_counter() - self.began)
        return next((place for place, (about, _) in enumerate(todo) if self._seconds(about) <= left), None)

    def _take(self, rows: list[dict], about: dict, began: float, left: int) -> None:
        """Keep the rows of a run that ended, and how much slower than alone it was."""
        rows = [about | row for row in rows]
        for row in rows:
            for point in row.get("curve", ()):
                point["device_seconds"] = about["device_seconds"] * point["steps"] / about["steps"]
            self.put(row)
        if "error" not in rows[-1] and (alone := about.get("device_seconds")):
            self.slower = max(self.slower, (time.perf_counter() - began - START_SECONDS) / alone)
        what = ", ".join(f"{key} {value}" for key, value in about.items() if key not in ("settings", "device_seconds"))
        print(f"{left} left: {what}: {told(rows[-1])}", flush=True)

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
        return about | {"settings": settings}, study_runs.not_timed
    seconds, steps = study.costs[cost_key(settings)], steps or study.steps_of(settings)
    about = about | {"settings": settings, "steps": steps, "device_seconds": steps * seconds}
    return about, partial(study_runs.train, settings, about["seed"], steps, study.conditions)


@contextmanager
def opened(
    given: argparse.Namespace,
    path: Path,
    default: dict,
    eval_seed: int = EVAL_SEED,
    diversity_videos: int = 2,
    flags: tuple[str, ...] = (),
    curve: tuple[float, ...] = (),
    costs_of: Path | None = None,
) -> Iterator[Study]:
    """Return the study of a result file, as the command says.

    flags: of train_rlhf.py. curve: as in `Conditions`. costs_of: another result file, whose seconds
    of a step are taken.
    """
    device = pick_device(given.device)
    on_cpu = device.type == "cpu"
    pools = Pools([] if on_cpu else given.devices, given.jobs or (1 if on_cpu else 6))
    with tempfile.TemporaryDirectory() as work:
        conditions = Conditions(
            device.type,
            Path(work),
            eval_seed,
            given.eval_prompts,
            diversity_videos,
            16 if on_cpu else 64,
            max(1, available_cores() // pools.jobs) if on_cpu else None,
            (*flags, *given.flags),
            curve,
        )
        of_time = given.limit or math.inf, costs_of, given.slower
        yield Study(given.output or path, conditions, given.steps, given.timed, pools, default, *of_time)


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
    parser.add_argument("--limit", type=float, help="seconds after which no run is to be under way; default: none")
    parser.add_argument(
        "--slower", type=float, default=SLOWER, help="by how much a run slows each beside it (default: %(default)s)"
    )
    parser.add_argument("--eval_prompts", type=int, default=128, help="held-out prompts (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="the result's file")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of train_rlhf.py, last")
    return parser
