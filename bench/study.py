"""Which method earns its compute: reward gradients against gradient-free baselines on nano, at equal device time.

    python bench/study.py [--sweep] [--only DRaFT-K Flow-GRPO] [--seeds 0 1 2 3 4] [--device cuda] [--devices 0 1]
        [--jobs 6] [--steps 80] [--output FILE] [--flags ...]

1. Every arm's optimizer step is timed alone on a device, twice, and the faster time counts: what disturbs only adds,
   and the first steps of a process are slow. The budget is the time of --steps steps of the default
   recipe; each arm trains for as many steps as fit into it, whatever else then runs beside it, and its learning rate
   falls to 0 over these.
2. Every arm is trained with every seed, --jobs of them at a time on each device, and judged on held-out prompts.

After each run the result is written anew, whole or not at all: a stopped study goes on, and a run that failed says why
and is made again next time. --sweep tries each arm's variants on other seeds and prompts instead and writes
study_sweep.json; the study takes the variants that gained most trained reward there. Then
`python bench/study_report.py` makes the tables, plots and sentences. What follows --flags goes to every run.

Prediction: gradients of the reward gain more for their time than policy gradients, and far more for each query; all
four steps in the window gain most on the verifier; drift control costs steps and trained reward, and narrows the
distance of trained to held-out gain; the best of n is hard to beat while few videos are wanted.
"""

import argparse
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before this folder, which has a rewards.py
import study_runs
from environment import environment
from study_arms import ARMS, BEST_OF, DEFAULT, ROOT, SWEEP, VARIANTS, chosen_by_sweep, cost_key, settings_of
from study_runs import Conditions

from rlhf.device import pick_device
from rlhf.parallel import available_cores

RESULT = ROOT / "bench" / "results" / "study.json"
SEEDS, SWEEP_SEEDS = [0, 1, 2, 3, 4], [100]
EVAL_SEED, SWEEP_EVAL_SEED = 11, 12  # prompts on which no recipe was chosen, and others to choose by
REPORT_AT, MOST_SAMPLES = [4, 16], 128


@dataclass(frozen=True)
class Pools:
    """Processes that work on the devices (none: on the CPU)."""

    devices: list[int]
    jobs: int  # at a time on each device

    def timers(self) -> list[ProcessPoolExecutor]:
        """For each device one process, alone on it."""
        return [self._open(1, [device], len(self.devices)) for device in self.devices] or [self._open(1, [], 1)]

    def workers(self) -> ProcessPoolExecutor:
        count = self.jobs * max(1, len(self.devices))
        return self._open(count, self.devices, count)

    def _open(self, count: int, devices: list[int], at_once: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # a fork can't use an accelerator that its parent has looked at
        threads = max(1, available_cores() // at_once)
        return ProcessPoolExecutor(
            count, context, partial(study_runs.start_worker, context.Value("i", 0), devices, threads)
        )


class Study:
    """A result file, and the processes that fill it."""

    def __init__(self, path: Path, conditions: Conditions, steps: int, timed: int, pools: Pools):
        self.path, self.conditions, self.steps, self.timed, self.pools = path, conditions, steps, timed, pools
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

    def calibrate(self, all_settings: list[dict], with_samples: bool) -> None:
        """Time what is not timed yet, one after the other on each device; then the budget is known."""
        alone, timers = replace(self.conditions, threads=None), self.pools.timers()
        self.about["base"] = timers[0].submit(study_runs.evaluate_base, alone).result()
        todo = {cost_key(settings): settings for settings in [settings_of(DEFAULT, {}), *all_settings]}
        todo = 2 * [(key, settings) for key, settings in todo.items() if key not in self.costs]
        for first in range(0, len(todo), len(timers)):
            self._time(todo[first : first + len(timers)], timers, alone)
        if with_samples and "seconds_per_sample" not in self.about:
            job = timers[0].submit(study_runs.seconds_per_sample, self.timed, alone)
            self.about["seconds_per_sample"] = job.result()
        for timer in timers:
            timer.shutdown()
        self.about["budget_seconds"] = self.steps * self.costs[cost_key(settings_of(DEFAULT, {}))]
        self.write()

    def _time(self, some: list[tuple[str, dict]], timers: list[ProcessPoolExecutor], alone: Conditions) -> None:
        task = study_runs.seconds_per_step
        jobs = [timer.submit(task, pair[1], self.timed, alone) for pair, timer in zip(some, timers, strict=False)]
        for (key, _), job in zip(some, jobs, strict=True):
            try:
                self.costs[key] = min(job.result(), self.costs.get(key, math.inf))
                print(f"a step: {job.result():.3f} s with {key}", flush=True)
            except Exception as error:  # its runs will say so; the others go on
                print(f"could not time {key}: {type(error).__name__}: {error}", flush=True)
        self.write()

    def steps_of(self, settings: dict) -> int:
        return max(1, round(self.about["budget_seconds"] / self.costs[cost_key(settings)]))

    def samples(self) -> int:
        """n for which best-of-n of all held-out prompts takes as long as a training and one video of each prompt."""
        of_all = self.conditions.eval_prompts * self.about["seconds_per_sample"]
        return min(MOST_SAMPLES, 1 + round(self.about["budget_seconds"] / of_all))

    def is_done(self, about: dict) -> bool:
        same = [row for row in self.rows if all(row.get(key) == value for key, value in about.items())]
        return any("error" not in row for row in same)

    def run(self, tasks: list[tuple[dict, Callable]]) -> None:
        """All tasks that are not done, each (what tells its row from others, what makes it)."""
        todo = [(about, task) for about, task in tasks if not self.is_done(about)]
        minutes = len(todo) * self.about["budget_seconds"] / 60
        print(f"{len(todo)} runs to make, {minutes:.0f} minutes one by one; {len(tasks) - len(todo)} done", flush=True)
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
        same = lambda other: all(other.get(key) == row.get(key) for key in ("arm", "seed", "variant"))
        self.rows = [other for other in self.rows if not same(other)] + [row]
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.about["wall_seconds"] = self.took + time.perf_counter() - self.began
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"environment": self.about, "rows": self.rows}, indent=1) + "\n")
        unfinished.replace(self.path)


def told(row: dict) -> str:
    if "error" in row:
        return row["error"]
    gains = ", ".join(f"{name} {row[name]['diff']:+.3f}" for name in ("trained", "verifier") if name in row)
    return f"{row['steps']} steps, {gains}"


def train_tasks(study: Study, arms: list[str], seeds: list[int], chosen: dict) -> list[tuple[dict, Callable]]:
    """The study itself: every arm with its chosen settings, seed after seed."""
    settings = {arm: settings_of(arm, chosen) for arm in arms if arm != BEST_OF}
    study.calibrate(list(settings.values()), BEST_OF in arms)
    tasks = []
    for seed in seeds:
        if BEST_OF in arms:  # first, for it takes longest
            about = {"arm": BEST_OF, "seed": seed, "settings": {"n": study.samples()}}
            given = seed, study.samples(), REPORT_AT, study.about["seconds_per_sample"], study.conditions
            tasks.append((about, partial(study_runs.best_of_n, *given)))
        tasks += [run_of(study, {"arm": arm, "seed": seed}, given) for arm, given in settings.items()]
    return tasks


def sweep_tasks(study: Study, arms: list[str], seeds: list[int]) -> list[tuple[dict, Callable]]:
    """Every variant of every arm, without drift control."""
    pairs = [(arm, variant) for arm in arms for variant in VARIANTS.get(arm, [])]
    study.calibrate([ARMS[arm] | variant for arm, variant in pairs], False)
    return [
        run_of(study, {"arm": arm, "variant": variant, "seed": seed}, ARMS[arm] | variant)
        for seed in seeds
        for arm, variant in pairs
    ]


def run_of(study: Study, about: dict, settings: dict) -> tuple[dict, Callable]:
    if cost_key(settings) not in study.costs:
        return about, study_runs.not_timed
    steps = study.steps_of(settings)
    about = about | {"settings": settings, "steps": steps, "device_seconds": steps * study.costs[cost_key(settings)]}
    return about, partial(study_runs.train, settings, about["seed"], steps, study.conditions)


def main(argv: list[str] | None = None) -> None:
    given = arguments(argv)
    device = pick_device(given.device)
    on_cpu = device.type == "cpu"
    pools = Pools([] if on_cpu else given.devices, given.jobs or (1 if on_cpu else 6))
    with tempfile.TemporaryDirectory() as work:
        conditions = Conditions(
            device.type,
            Path(work),
            SWEEP_EVAL_SEED if given.sweep else EVAL_SEED,
            given.eval_prompts,
            0 if given.sweep else given.eval_prompts,
            16 if on_cpu else 64,
            max(1, available_cores() // pools.jobs) if on_cpu else None,
            tuple(given.flags),
        )
        study = Study(given.output or (SWEEP if given.sweep else RESULT), conditions, given.steps, given.timed, pools)
        if given.sweep:
            tasks = sweep_tasks(study, given.only, given.seeds or SWEEP_SEEDS)
        else:
            tasks = train_tasks(study, given.only, given.seeds or SEEDS, chosen_by_sweep(given.chosen_by))
        study.run(tasks)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [*ARMS, BEST_OF]
    parser.add_argument("--only", nargs="+", default=every, choices=every, metavar="ARM", help=f"of {', '.join(every)}")
    parser.add_argument("--sweep", action="store_true", help="choose settings, on other seeds and prompts")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 4; for --sweep 100")
    parser.add_argument(
        "--steps", type=int, default=80, help="the budget, in steps of the default recipe (%(default)s)"
    )
    parser.add_argument("--timed", type=int, default=12, help="steps by which an arm is timed (default: %(default)s)")
    parser.add_argument("--device", help="kind of device; default: the accelerator of this machine")
    parser.add_argument("--devices", type=int, nargs="+", default=[0], help="which of them (default: 0)")
    parser.add_argument("--jobs", type=int, help="runs at a time on a device; default: 1 on a CPU, else 6")
    parser.add_argument("--eval_prompts", type=int, default=128, help="held-out prompts (default: %(default)s)")
    parser.add_argument("--chosen_by", type=Path, default=SWEEP, help="a sweep's result (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="default: bench/results/study.json or study_sweep.json")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of train_rlhf.py, last")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
