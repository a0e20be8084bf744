"""Processor time of a step of configs/nano.yaml on one CPU thread, by phase and by setting.

    python bench/cpu_step.py [--rounds 3]        writes bench/results/cpu_step.json

Arms change one thing each. They take turns in rounds, a process each, and are compared by processor
time, which other programs disturb little. The median step counts; the first of a process does not.

Prediction: the decoder takes most of a step, and half of that in bfloat16 on a processor that
multiplies it; page faults take two fifths if freed memory goes back to the system.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, make_parser, write_rows

RESULT = Path(__file__).parent / "results" / "cpu_step.json"
STEPS = 5
STEP = """
import json, sys, time
import rlhf.distributed.accelerator
from rlhf.config.parse import parse_config
from rlhf.trainer import RewardGradientTrainer
folder, steps, memory, *flags = sys.argv[1:]
if memory == "returned":
    rlhf.distributed.accelerator.keep_freed_memory = lambda: None
fixed = "--config configs/nano.yaml --device cpu --cpu_threads 1 --num_eval_prompts 2 --report_to none"
trainer = RewardGradientTrainer(args=parse_config([*fixed.split(), "--output_dir", folder, *flags]))
decode, back_propagate = trainer.scorer.decode, trainer._back_propagate
last, phases = 0.0, {}

def lap(phase):
    global last
    now = time.process_time()
    phases[phase], last = phases.get(phase, 0) + now - last, now

def timed_decode(latents, step):
    lap("denoiser forward")
    latents.register_hook(lambda grad: lap("decoder backward"))
    video = decode(latents, step)
    video.register_hook(lambda grad: lap("reward backward"))
    lap("decoder forward")
    return video

def timed_back_propagate(loss):
    lap("reward forward")
    back_propagate(loss)
    lap("denoiser backward")

object.__setattr__(trainer.scorer, "decode", timed_decode)
trainer._back_propagate = timed_back_propagate
for step in range(int(steps)):
    phases, last = {}, time.process_time()
    trainer.step(step)
    lap("optimizer and rest")
    print("phases", json.dumps(phases), flush=True)
"""
ARMS = {
    "as shipped": ("kept",),
    "DRTune, all four steps": ("kept", "--method", "drtune", "--num_grad_steps", "4"),
    "VAE in float32": ("kept", "--vae_dtype", "float32"),
    "guidance branches apart": ("kept", "--guidance_together", "false"),
    "freed memory returned": ("returned",),
}


def measure(memory: str, *flags: str) -> list[dict[str, float]]:
    """Return the processor seconds of each phase, for each step but the first."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", STEP, str(Path(folder) / "run"), str(STEPS), memory, *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULT.parents[2]).stdout
    return [json.loads(line.removeprefix("phases")) for line in done.splitlines() if line.startswith("phases")][1:]


def main() -> None:
    """Run the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each arm (default: %(default)s)")
    given = parser.parse_args()
    steps = {arm: [] for arm in ARMS}
    for _ in range(given.rounds):
        for arm, settings in ARMS.items():
            steps[arm] += measure(*settings)
            rows = [_row(arm, found) for arm, found in steps.items() if found]
            print(arm, next(row["seconds"] for row in rows if row["arm"] == arm), flush=True)
    write_rows(RESULT, environment(torch.device("cpu")) | {"threads": 1, "rounds": given.rounds}, rows)


def _row(arm: str, steps: list[dict[str, float]]) -> dict:
    """Return an arm's median processor seconds of a step, those of its phases, and all steps."""
    phases = {phase: round(statistics.median(step[phase] for step in steps), 3) for phase in steps[0]}
    every = [round(sum(step.values()), 3) for step in steps]
    return {"arm": arm, "seconds": statistics.median(every), "phases": phases, "all": every}


if __name__ == "__main__":
    main()
