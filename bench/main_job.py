"""DRTune on nano with 8 videos a step, on a GPU.

    python bench/main_job.py [--seeds 0 1 2] [--device cuda] [--devices 0]

It was configs/nano.yaml; bench/main_job_cpu.py measures what that file is today. Writes
bench/results/main_job.json. Judged on prompts on which no setting was chosen.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from md_table import table
from nano_study import arguments, opened, run_of
from study_arms import ROOT

RESULT = ROOT / "bench" / "results" / "main_job.json"
SEEDS = [0, 1, 2]
ARM, STEPS = "DRTune as shipped", 160
SETTINGS = {
    "method": "drtune",
    "num_grad_steps": 4,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 8,
    "ema_decay": 0.95,
}


def main_job_table(result: dict) -> str:
    """Return a row for each seed: base and tuned, and the difference with its interval."""
    lines = []
    for row in sorted(result["rows"], key=lambda row: row["seed"]):
        low, high = row["verifier"]["ci95"]
        right = f"{row['verifier']['base']:.1%} → **{row['verifier']['tuned']:.1%}**"
        cells = [with_interval(row["trained"]), f"{right}, {row['verifier']['diff']:+.3f} [{low:+.3f}, {high:+.3f}]"]
        relative = [f"{row[m]['tuned'] / row[m]['base'] - 1:+.1%}" for m in ("motion", "diversity")]
        lines.append([str(row["seed"]), *cells, with_interval(row["clip"]), *relative])
    headings = ["preference model (trained)", "verifier, all attributes right", "CLIP score (held out)"]
    return table(["seed", *headings, "motion", "diversity"], lines)


def with_interval(row: dict) -> str:
    """Return base, tuned, and their difference with its confidence interval."""
    low, high = row["ci95"]
    return f"{row['base']:.3f} → {row['tuned']:.3f}, {row['diff']:+.3f} [{low:+.3f}, {high:+.3f}]"


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    given = arguments(__doc__.splitlines()[0], [ARM], STEPS).parse_args(argv)
    with opened(given, RESULT, SETTINGS) as study:
        study.calibrate([SETTINGS])
        study.run([run_of(study, {"arm": ARM, "seed": seed}, SETTINGS, STEPS) for seed in given.seeds or SEEDS])


if __name__ == "__main__":
    main()
