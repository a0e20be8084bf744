"""PRFL with a distilled head against DRaFT-K with decoding, on nano: held-out gain per second.

    python bench/prfl.py [--device cpu] [--seeds 0] [--steps 40]

A head on nano's first blocks is distilled from nano_preference, once, into bench/runs/prfl. Then
each arm trains with configs/nano.yaml but for what `ARMS` changes, and is judged on the same
held-out prompts: by nano_preference itself, the verifier and the CLIP score. Seconds are those of
the optimizer steps alone; on a CPU those of the process, so that other programs do not count.
Rows that are in bench/results/prfl.json are not made again, and a picture of the first prompts goes
to bench/runs/prfl/sheet.png.

Prediction: a step of prfl takes two thirds of the time, for it decodes nothing and stops at half of
the way on average. Its gain on the verifier is below that of draft_k at an equal number of steps,
since the head ranks videos of nano only roughly; per second they are alike.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, make_parser, read_rows, show_row, write_rows
from study_inputs import DISTIL, make_head

from rewards.models.latent_reward import NAME
from rlhf.config import RewardGradientConfig
from rlhf.config.parse import CONFIGS, parse_config
from rlhf.device import pick_device, synchronize
from rlhf.evaluation.held_out import Evaluation
from rlhf.evaluation.statistics import paired_interval
from rlhf.trainer import RewardGradientTrainer

ROOT = Path(__file__).parents[1]
RESULT, WORK = ROOT / "bench" / "results" / "prfl.json", ROOT / "bench" / "runs" / "prfl"
HEAD, BASE = WORK / "head.safetensors", "base"
JUDGES = ["nano_preference", "nano_verifier", "nano_clip"]
PRFL = {"method": "prfl", "reward_funcs": [NAME], "reward_kwargs": {NAME: {"path": str(HEAD), "recompute": False}}}
ARMS = {
    "draft_k, K = 1": {"method": "draft_k", "reward_funcs": ["nano_preference"]},
    "prfl": PRFL,
    "prfl, a tenth of the learning rate": PRFL | {"learning_rate": 3e-4},
}
SHOWN, WARM_UP = 8, 2


def settings_of(arm: str, seed: int, arguments) -> RewardGradientConfig:
    """Return the settings of an arm's run."""
    args = parse_config([], CONFIGS / "nano.yaml")
    changes = {
        "num_grad_steps": 1,
        "method_kwargs": None,
        "learning_rate": 3e-3,
        "max_grad_norm": 0.3,
        "eval_seed": 11,
        "num_eval_prompts": arguments.prompts,
        "report_to": [],
    }
    changes |= {"max_steps": arguments.steps, "seed": seed, "device": arguments.device, "warmup_steps": 2}
    changes |= {"output_dir": str(WORK / f"{arm} {seed}"), "overwrite_output_dir": True, "cpu_threads": 1}
    changes |= {"num_sample_prompts": SHOWN, "num_diversity_prompts": arguments.prompts}
    arm_settings = ARMS[arm] | {"eval_reward_funcs": [j for j in JUDGES if j not in ARMS[arm]["reward_funcs"]]}
    return RewardGradientConfig(**vars(args) | changes | arm_settings)


def clock(device: torch.device) -> Callable[[], float]:
    """Return a clock of the device's work: of a CPU, the seconds of this process."""
    if device.type == "cpu":
        return time.process_time
    return lambda: (synchronize(device), time.perf_counter())[1]


def run(arm: str, seed: int, arguments, device: torch.device) -> dict:
    """Train and judge an arm; return its row. The base is judged once, by the first arm."""
    trainer, now = RewardGradientTrainer(args=settings_of(arm, seed, arguments)), clock(device)
    trainer._begin()  # its folder, without the evaluations that train() makes
    held_out, base_path = trainer.monitor.held_out, WORK / f"{BASE}-{arguments.prompts}.safetensors"
    if not base_path.exists():
        held_out.evaluate(BASE, 0, trainer.sample_base).save(base_path)
    seconds, rewards = [], []
    for step in range(arguments.steps):
        began = now()
        rewards.append(trainer.step(step)["reward"])
        seconds.append(now() - began)
    with trainer.masters.use(trainer.masters.average):
        tuned = held_out.evaluate(arm, arguments.steps)
    tuned.save(WORK / f"{arm} {seed}.safetensors")
    base = Evaluation.load(base_path)
    judged = {name: paired_interval(base.scores[name], tuned.scores[name]) for name in [*JUDGES, "diversity"]}
    steady = sum(seconds[WARM_UP:]) / len(seconds[WARM_UP:])
    return {
        "arm": arm,
        "seed": seed,
        "steps": arguments.steps,
        "prompts": arguments.prompts,
        "seconds": sum(seconds),
        "seconds_per_step": steady,
        "trained_reward": rewards,
        **judged,
        "verifier_points_per_minute": 60 * 100 * judged["nano_verifier"]["diff"] / sum(seconds),
        "preference_per_minute": 60 * judged["nano_preference"]["diff"] / sum(seconds),
    }


def draw_sheet(seed: int, prompts: int, path: Path) -> None:
    """Draw five frames of the first prompts' videos: of the base and of each arm, row by row."""
    files = [WORK / f"{BASE}-{prompts}.safetensors", *(WORK / f"{arm} {seed}.safetensors" for arm in ARMS)]
    videos = [Evaluation.load(file).videos_NCTHW[:SHOWN] for file in files]
    frames = torch.linspace(0, videos[0].shape[2] - 1, 5).round().long()
    strips = [video[:, :, frames].permute(0, 3, 2, 4, 1).flatten(2, 3) for video in videos]  # (N, H, 5 W, 3)
    rows = torch.cat([torch.cat(list(strip), 0) for strip in strips], dim=1)
    Image.fromarray(rows.numpy()).resize((3 * rows.shape[1], 3 * rows.shape[0]), Image.NEAREST).save(path)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of 8 videos")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts")
    parser.add_argument("--videos", type=int, default=DISTIL["videos"], help="from which the head learns")
    parser.add_argument("--device", help="default: the accelerator of this machine")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    WORK.mkdir(parents=True, exist_ok=True)
    device = pick_device(arguments.device)
    arguments.device = device.type
    head = make_head(HEAD, device.type, {"videos": arguments.videos, "cpu_threads": 1})
    about = environment(device) | {"head": head}
    rows = read_rows(arguments.output, about, lambda row: (row["arm"], row["seed"], row["steps"], row["prompts"]))
    for seed in arguments.seeds:
        for arm in ARMS:
            key = arm, seed, arguments.steps, arguments.prompts
            if key not in rows:
                rows[key] = run(arm, seed, arguments, device)
                write_rows(arguments.output, about, rows.values())
            show_row({name: value for name, value in rows[key].items() if name != "trained_reward"})
    draw_sheet(arguments.seeds[0], arguments.prompts, WORK / "sheet.png")


if __name__ == "__main__":
    main()
