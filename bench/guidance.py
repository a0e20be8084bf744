"""Angle and length of guidance's cheaper gradients against the exact one, on nano.

    python bench/guidance.py [--device cpu]     writes bench/results/guidance.json in a minute

Prediction: for one step, "none" points where "text" does and is guidance_scale times shorter; over
more steps the text branch alone turns further away, since it leaves (g - 1) J_neg out of every
factor; "distill", the exact gradient of another sampler, is no nearer.
"""

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, show_row, write_rows

from rlhf.config import RewardGradientConfig
from rlhf.device import generator, synchronize
from rlhf.generator.wan_decoder import decode_video
from rlhf.method.grad_steps import choose_grad_steps
from rlhf.method.losses import reward_loss
from rlhf.method.rollout import rollout
from rlhf.method.velocity import velocity_field
from rlhf.trainer import RewardGradientTrainer

RESULT = Path(__file__).parent / "results" / "guidance.json"
MODES, STEPS, BATCHES, BATCH = ("text", "none", "distill"), (1, 2, 4), 2, 2
ADAPTERS = {"at the start (B = 0)": 0.0, "trained (B drawn, spread 0.02)": 0.02}


def make_trainer(device: str | None, **settings) -> RewardGradientTrainer:
    """Return a trainer of nano."""
    common = {
        "output_dir": f"{tempfile.mkdtemp()}/run",
        "device": device,
        "report_to": ["none"],
        "eval_prompts": "none",
    }
    sizes = {"per_device_train_batch_size": BATCH, "max_steps": BATCHES}
    return RewardGradientTrainer(args=RewardGradientConfig(**common | sizes | settings))


def shake(trainer: RewardGradientTrainer, spread: float) -> None:
    """Draw the adapter's B matrices, as if it had been trained."""
    masters = trainer.masters
    for name, piece in masters.named(masters.vector).items():
        if "lora_B" in name:
            piece.copy_(spread * torch.randn(piece.shape, generator=generator("shake", name)))
    masters.write()


def gradient(trainer: RewardGradientTrainer, mode: str, num_grad: int, batch_number: int) -> torch.Tensor:
    """Return the loss's gradient at the adapter, in float64 on the CPU."""
    args, batch = trainer.args, trainer.batches.batch(batch_number, 0)
    cond = trainer.text(batch.prompts, trainer.device)
    prefix, window = (velocity_field(trainer.pipe.transformer, cond, args.guidance_scale, m) for m in ("full", mode))
    steps = choose_grad_steps("last", args.num_inference_steps, num_grad)
    states = rollout(prefix, window, batch.noise("train"), trainer.sigmas, steps)
    video = decode_video(trainer.pipe.vae, states[-1])
    reward_loss(trainer.rewards(video, batch.prompts)[0]).backward()
    trainer.masters.collect_grad()
    found = trainer.masters.vector.grad.double().cpu()
    trainer.masters.vector.grad.zero_()
    return found


def compare(trainer: RewardGradientTrainer, num_grad: int) -> list[dict]:
    """Return a row for each mode of guidance_gradient, against "full"."""
    rows = {mode: {"cosine": [], "norm_ratio": [], "seconds": []} for mode in ("full", *MODES)}
    for batch in range(BATCHES):
        exact = None
        for mode, found in rows.items():
            synchronize(trainer.device)
            began = time.perf_counter()
            one = gradient(trainer, mode, num_grad, batch)
            found["seconds"].append(time.perf_counter() - began)
            exact = one if exact is None else exact
            found["cosine"].append(torch.cosine_similarity(one, exact, dim=0).item())
            found["norm_ratio"].append((one.norm() / exact.norm()).item())
    return [
        {"arm": mode, "grad_steps": num_grad, **{key: sum(v) / len(v) for key, v in found.items()}, "all": found}
        for mode, found in rows.items()
    ]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="kind of device; default: the accelerator of this machine")
    trainer = make_trainer(parser.parse_args().device)
    rows = []
    for (adapter, spread), num_grad in itertools.product(ADAPTERS.items(), STEPS):
        shake(trainer, spread)
        found = [{"adapter": adapter} | row for row in compare(trainer, num_grad)]
        for row in found:
            show_row(row)
        rows += found
    about = environment(trainer.device) | {"model": "nano", "batch": BATCH, "batches": BATCHES}
    write_rows(RESULT, about, rows)


if __name__ == "__main__":
    main()
