"""The main job on this machine's CPU by its public command: gains of several seeds, and time.

    python bench/main_job_cpu.py [--seeds 0 1 2] [--formats auto] [--beside]

Other flags go to train_rlhf.py. Writes bench/results/main_job_cpu.json; runs that are in it are
not made again. Machines of as many cores differ, so time is also stated as a multiple of a
reference, a matrix product and a convolution that the machine runs before each job. `--beside` says
that other programs run, too: the gains hold, the seconds don't. After a job four videos of each
held-out prompt tell its diversity and the verifier's gain: its own evaluation has one of each, and
compares few pairs.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, make_parser, show_row
from md_table import table
from study_runs import Conditions, judge, pair_distance, several, start

from rlhf.config.parse import CONFIGS
from rlhf.evaluation.statistics import paired_interval
from rlhf.io import load_yaml, write_json

ROOT = Path(__file__).parents[1]
EVAL_SEED = "--eval_seed"
VIDEOS, VERIFIER = 4, "nano_verifier"  # videos of each prompt, and their judge
SEVERAL, SHARES = "verifier_several", "{:.1%} → **{:.1%}**"
RESULT = ROOT / "bench" / "results" / "main_job_cpu.json"
MEASURES = ("seconds", "steps", "trained", "held_out", "motion", "diversity", "saturation", "high_frequency")


def recipe() -> dict:
    """Return what configs/nano.yaml says of the training, which tells its rows from former ones."""
    given = load_yaml((CONFIGS / "nano.yaml").read_text())
    names = ("method", "method_kwargs", "learning_rate", "max_grad_norm", "max_steps")
    return {name: given.get(name) for name in names}


def main_job_cpu_table(result: dict) -> str:
    """Return a row for each run of today's recipe: base and tuned, with the paired interval."""
    lines = []
    for row in result["rows"]:
        if row.get("recipe") != recipe():
            continue
        right = [
            with_interval(found, SHARES) if found else "-" for found in (row["held_out"]["verifier"], row.get(SEVERAL))
        ]
        scores = [with_interval(row["trained"]["nano_preference"]), *right, with_interval(row["held_out"]["clip"])]
        motion, diversity = (f"{row[m]['tuned'] / row[m]['base'] - 1:+.1%}" for m in ("motion", "diversity"))
        seen = diversity if "diversity_videos" in row else "-"
        seconds = "-" if row["beside_others"] else f"{row['wall_seconds']:.0f}"
        about = [str(row["seed"]), eval_seed(row["flags"]), row["device"].replace("(R)", "").removesuffix(" Processor")]
        lines.append([*about, *scores, motion, seen, seconds])
    right = ["verifier, all attributes right", "the same, four videos a prompt"]
    headings = ["preference model (trained)", *right, "CLIP score (held out)"]
    about = ["seed", "`eval_seed`", "processor"]
    return table([*about, *headings, "motion", "diversity", "seconds in all"], lines)


def with_interval(row: dict, form: str = "{:.3f} → {:.3f}") -> str:
    """Return base and tuned in this form, and their difference with its confidence interval."""
    low, high = row["ci95"]
    return f"{form.format(row['base'], row['tuned'])}, {row['diff']:+.3f} [{low:+.3f}, {high:+.3f}]"


def eval_seed(flags: list[str]) -> str:
    """Return the seed of the held-out prompts."""
    return flags[flags.index(EVAL_SEED) + 1] if EVAL_SEED in flags else "0"


@lru_cache
def of_several(adapter: Path | None, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distance of the pairs of each held-out prompt's videos, and the share right, (N,).

    adapter: None for the base. seed: of the prompts. The distance is the mean over all pairs.
    """
    distances, rights = [], []
    with tempfile.TemporaryDirectory() as work, torch.no_grad():
        conditions = Conditions("cpu", Path(work), seed)
        trainer = start({"initial_adapter": adapter} if adapter else {}, 0, 1, conditions)
        for prompts, made in several(trainer, VIDEOS, 16):
            distances.append(pair_distance(made))
            scores = [judge(video, video, prompts, trainer, conditions) for video in made]
            rights.append(torch.stack([score[VERIFIER] for score in scores]).mean(0))
    return torch.cat(distances), torch.cat(rights)


def reference_seconds(repeats: int = 5) -> float:
    """Return the least seconds of a matrix product of 2048 and a convolution of 16 channels."""
    torch.manual_seed(0)
    matrix, video, kernel = torch.randn(2048, 2048), torch.randn(8, 16, 19, 66, 66), torch.randn(16, 16, 3, 3, 3)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        matrix @ matrix
        torch.nn.functional.conv3d(video, kernel)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def run_job(seed: int, vae_dtype: str, flags: list[str]) -> dict:
    """Run the public command and return what its summary says, with the processor time it took."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["accelerate", "launch", "train_rlhf.py", "--seed", seed, "--vae_dtype", vae_dtype, *flags]
        command = [str(part) for part in [*command, "--output_dir", Path(folder) / "run", "--report_to", "none"]]
        reference = reference_seconds()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wall = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
        prompts = int(eval_seed(flags))
        both = zip(of_several(None, prompts), of_several(Path(folder) / "run" / "adapter", prompts), strict=True)
        diversity, right = (paired_interval(*pair) for pair in both)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    times = {"wall_seconds": wall, "processor_seconds": processor, "reference_seconds": reference}
    found = {key: summary[key] for key in MEASURES} | {"diversity": diversity, "diversity_videos": VIDEOS}
    return {**times, "multiple_of_reference": wall / reference, **found, SEVERAL: right}


def main() -> None:
    """Run the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--formats", nargs="*", default=["auto"], help="number formats of the VAE")
    parser.add_argument("--beside", action="store_true", help="say that other programs ran beside it")
    given, flags = parser.parse_known_args()
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    about = environment(torch.device("cpu")) | {"load": os.getloadavg()[0]}
    for seed in given.seeds:
        for vae_dtype in given.formats:
            key = {"seed": seed, "vae_dtype": vae_dtype, "beside_others": given.beside, "device": about["device"]}
            key |= {"flags": flags, "recipe": recipe()}
            if any(all(row.get(name) == value for name, value in key.items()) for row in rows):
                continue
            rows.append(key | run_job(seed, vae_dtype, flags) | {"environment": about})
            write_json(RESULT, {"command": "python bench/main_job_cpu.py", "rows": rows})
            show_row({name: rows[-1][name] for name in (*key, "wall_seconds", "multiple_of_reference")})


if __name__ == "__main__":
    main()
