"""Reward gradients against gradient-free methods on nano, at equal device time.

    python bench/study.py [--sweep] [--only DRaFT-K Flow-GRPO] [--seeds 0 1 2 3 4] [--limit 540]
        [--device cuda] [--devices 0 1] [--jobs 6] [--steps 80] [--output FILE] [--flags ...]

1. What arms share is made: a distilled head for PRFL, real videos (bench/study_inputs.py).
2. Every arm's optimizer step is timed alone on a device, twice, and the faster time counts: what
   disturbs only adds, and the first steps of a process are slow. The budget is the time of --steps
   steps of the default recipe; each arm trains for as many steps as fit into it, whatever else then
   runs beside it, and its learning rate falls to 0 over these.
3. Every arm is trained with every seed, seed after seed and in the order of --only, --jobs of them
   at a time on each device, and judged on held-out prompts.

With --steps 400 or more the result is study_long.json, and every run is judged along its way, too:
after the shares --curve of its steps. These are points of one schedule, whose learning rate falls
to 0 only at the end.

A stopped study goes on. --sweep tries each arm's variants on other seeds and prompts instead and
writes study_sweep.json; the study takes the variants that gained most trained reward there. Then
`python bench/tables.py` writes the tables, `python bench/study_plots.py` the plots. What follows
--flags goes to every run.

Prediction: gradients of the reward gain more for their time than policy gradients, and far more for
each query; all four steps in the window gain most on the verifier; drift control costs steps and
trained reward, and narrows the distance of trained to held-out gain; the best of n is hard to beat
while few videos are wanted. In ten times the time DRaFT-K passes best-of-16 and turns; with drift
control, an average of the weights or real videos it does not.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import study_runs
from nano_study import EVAL_SEED, Study, arguments, opened, run_of
from study_arms import (
    ARMS,
    BEST_OF,
    DEFAULT,
    LONG_ARMS,
    LONG_CHANGES,
    SWEEPS,
    VARIANTS,
    changed,
    chosen_by_sweeps,
    settings_of,
)
from study_inputs import make_inputs
from study_numbers import LONG_RESULT, RESULT

SEEDS, SWEEP_SEEDS = [0, 1, 2, 3, 4], [100]
SWEEP_EVAL_SEED = 12  # other prompts, to choose by
REPORT_AT, MOST_SAMPLES = [4, 16], 128
LONG, CURVE = 400, [0.1, 0.2, 0.4, 0.7]  # steps of the default arm, and shares of an arm's steps
DIVERSITY_VIDEOS = 4  # of each prompt in a long run: one pair leaves +-30 % of a run's diversity open


def train_tasks(study: Study, arms: list[str], seeds: list[int], chosen: dict) -> list[tuple[dict, Callable]]:
    """Return the tasks of the study: every arm with its chosen settings, seed after seed."""
    settings = {arm: settings_of(arm, chosen) for arm in arms if arm != BEST_OF}
    study.about |= make_inputs([*settings.values()], study.conditions.device)
    study.calibrate(list(settings.values()), BEST_OF in arms)
    tasks = []
    for seed in seeds:
        if BEST_OF in arms:  # first, for it takes longest
            about = {"arm": BEST_OF, "seed": seed, "settings": {"n": samples(study)}}
            given = seed, samples(study), REPORT_AT, study.about["seconds_per_sample"], study.conditions
            tasks.append((about, partial(study_runs.best_of_n, *given)))
        tasks += [run_of(study, {"arm": arm, "seed": seed}, given) for arm, given in settings.items()]
    return tasks


def sweep_tasks(study: Study, arms: list[str], seeds: list[int]) -> list[tuple[dict, Callable]]:
    """Every variant of every arm, without drift control."""
    runs = [(arm, variant, changed(ARMS[arm], variant)) for arm in arms for variant in VARIANTS.get(arm, [])]
    settings = [given for *_, given in runs]
    study.about |= make_inputs(settings, study.conditions.device)
    study.calibrate(settings)
    return [
        run_of(study, {"arm": arm, "variant": variant, "seed": seed}, given)
        for seed in seeds
        for arm, variant, given in runs
    ]


def samples(study: Study) -> int:
    """Return the n whose best-of-n takes as long as a training and one video a prompt."""
    of_all = study.conditions.eval_prompts * study.about["seconds_per_sample"]
    return min(MOST_SAMPLES, 1 + round(study.about["budget_seconds"] / of_all))


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = arguments(__doc__.splitlines()[0], [*ARMS, BEST_OF], 80)
    parser.set_defaults(only=[arm for arm in [*ARMS, BEST_OF] if arm not in LONG_ARMS])
    parser.add_argument("--sweep", action="store_true", help="choose settings, on other seeds and prompts")
    parser.add_argument("--chosen_by", type=Path, nargs="+", default=SWEEPS, help="sweeps; an arm's last one counts")
    parser.add_argument("--curve", type=float, nargs="*", help=f"default: {CURVE}, none below {LONG} steps")
    parser.add_argument("--costs_of", type=Path, help="a result of the same device, whose times of steps are taken")
    given, default = parser.parse_args(argv), settings_of(DEFAULT, {})
    is_long = given.steps >= LONG
    curve = tuple(CURVE if given.curve is None and is_long else given.curve or ())
    if given.sweep:
        with opened(given, SWEEPS[-1], default, SWEEP_EVAL_SEED, 0, costs_of=given.costs_of) as study:
            study.run(sweep_tasks(study, given.only, given.seeds or SWEEP_SEEDS))
    else:
        path = LONG_RESULT if is_long else RESULT
        videos = DIVERSITY_VIDEOS if is_long else 2
        with opened(given, path, default, EVAL_SEED, videos, curve=curve, costs_of=given.costs_of) as study:
            chosen = chosen_by_sweeps(given.chosen_by)
            for arm, more in LONG_CHANGES.items() if is_long else ():
                chosen[arm] = changed(chosen.get(arm, {}), more)
            study.run(train_tasks(study, given.only, given.seeds or SEEDS, chosen))


if __name__ == "__main__":
    main()
