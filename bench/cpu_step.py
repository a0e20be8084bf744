"""Time of a nano step on a CPU: with and without kept memory, and beside another program.

    python bench/cpu_step.py        writes bench/results/cpu_step.json

Prediction: page faults take two fifths of a step. Beside a second busy program of as many threads a
step can stall for minutes, since threads wait for one another; such an arm has no seconds.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, make_parser, write_rows

RESULT = Path(__file__).parent / "results" / "cpu_step.json"
STEPS = 6
STEP = """
import sys, torch
import rlhf.distributed.accelerator
from rlhf.config import RewardGradientConfig
from rlhf.trainer import RewardGradientTrainer
if sys.argv[2] == "returned":
    rlhf.distributed.accelerator.keep_freed_memory = lambda: None
settings = dict(num_grad_steps=4, per_device_train_batch_size=8, num_eval_prompts=1, num_sample_prompts=0)
args = RewardGradientConfig(output_dir=sys.argv[1], max_steps=100, report_to=["none"], device="cpu", **settings)
trainer = RewardGradientTrainer(args=args)
for step in range(int(sys.argv[3])):
    print("seconds", trainer.step(step)["seconds"], flush=True)
"""
BUSY = "import torch\nx = torch.randn(700, 700)\nwhile True: x = (x @ x).tanh()"
ARMS = {"as shipped": "kept", "freed memory returned": "returned"}


def measure(memory: str, limit: float = 120) -> list[float]:
    """Seconds of each step but the first, as many as were done within the limit."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", STEP, str(Path(folder) / "run"), memory, str(STEPS)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit).stdout
        except subprocess.TimeoutExpired as error:
            done = (error.stdout or b"").decode()
    return [float(line.split()[1]) for line in done.splitlines() if line.startswith("seconds")][1:]


def main() -> None:
    """Run the command."""
    make_parser(__doc__).parse_args()
    rows = []
    for phase in ("alone", "beside a busy program"):
        company = subprocess.Popen([sys.executable, "-c", BUSY]) if phase != "alone" else None
        for arm, memory in ARMS.items():
            seconds = measure(memory)
            median = statistics.median(seconds) if seconds else None
            rows.append({"arm": arm, "phase": phase, "seconds": median, "all": seconds})
            print(rows[-1], flush=True)
        if company:
            company.kill()
    write_rows(RESULT, environment(torch.device("cpu")) | {"batch": 8, "steps": STEPS}, rows)


if __name__ == "__main__":
    main()
