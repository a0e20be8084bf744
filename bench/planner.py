"""The planner's figures beside what a device does: peak memory and seconds of a step, phase by phase.

    python bench/planner.py                 all settings, on this machine's accelerator; about four minutes on an H200
    python bench/planner.py --stages predict      makes the predictions anew, from settings and rates: without a device
    python bench/package.py                 makes the rates a part of the package
    python bench/tables.py                  puts the results into docs/planner.md

What is predicted is what PyTorch calls allocated at most; reserved memory is in the rows, too, and what the process
takes of the device besides. nano is the embedded model in the real trainer. The full size is ContentV-8B with random
weights, 432x768, as in bench/step.py: of its sampling one step is measured and counted for all, which the row says.
Rows go to bench/results/planner.json one by one; the same command goes on with what is missing.

Prediction: memory within 15 %, time within 30 %.
"""

import argparse
import dataclasses
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before this folder, which has a rewards.py
from environment import environment
from planner_arms import CAPS_GIB, FULL, NANO, STEPS, settings_of
from step import PROMPT, limit_memory, write
from step_arms import SIZES, Rig, make_reward

from rlhf.checks import model_card, with_sampling
from rlhf.config import RewardGradientConfig
from rlhf.contentv.files import CONTENTV_8B
from rlhf.contentv.flow import euler_step
from rlhf.device import memory_beside, peak_memory, pick_device, reset_peak_memory, synchronize
from rlhf.fields import VelocityFields
from rlhf.optimizer import clip_gradient
from rlhf.planner import Planner
from rlhf.rates import Rates, measure_rates
from rlhf.trainer import RewardGradientTrainer
from rlhf.types import Conditioning

RESULT = Path(__file__).parent / "results" / "planner.json"
GIB, INFO = 2**30, {"fps": 24, "seed": 0, "step": 0}


@dataclasses.dataclass
class Step:
    """What an optimizer step is made of, of either size; `measure` goes through it phase by phase."""

    args: RewardGradientConfig
    fields: VelocityFields
    decode: Callable
    reward: Callable  # (video, step) -> scores
    masters: object
    optimizer: object
    sigmas: torch.Tensor
    cond: Conditioning
    noise_BCTHW: torch.Tensor
    device: torch.device

    def measure(self) -> dict[str, dict]:
        """{phase: {"seconds", "peak_gib", "held_gib" before}} of one step whose sampling is one denoising step."""
        phases: dict[str, dict] = {}
        run = partial(self._timed, phases)
        field, x = self.fields.window(self.cond), 0.3 * self.noise_BCTHW
        run("sampling", torch.no_grad()(self.fields.tuned(self.cond)), x, self.sigmas[0])
        latents = run("segment forward", self._window, field, x)
        video = run("decode forward", self.decode, latents, 0)
        scores_B = run("reward forward", self.reward, video)
        (of_video,) = run("reward backward", torch.autograd.grad, -scores_B.mean(), video)
        shown = video.detach()  # the trainer keeps it
        del scores_B
        (of_latents,) = run("decode backward", torch.autograd.grad, video, latents, of_video)
        del video, of_video
        run("segment backward", latents.backward, of_latents)
        del latents, shown
        run("optimizer", self._update)
        return phases

    def _window(self, field: Callable, x: torch.Tensor) -> torch.Tensor:
        last = len(self.sigmas) - 1
        for i in range(last - self.args.num_grad_steps, last):
            x = euler_step(x, field(x, self.sigmas[i]), self.sigmas[i], self.sigmas[i + 1])
        return x

    def _update(self) -> None:
        self.masters.collect_grad()
        gradient = self.masters.vector.grad
        clip_gradient(gradient, gradient.norm().item(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.masters.write()

    def _timed(self, phases: dict, name: str, work: Callable, *inputs):
        held = allocated(self.device)
        reset_peak_memory(self.device)
        synchronize(self.device)
        began = time.perf_counter()
        result = work(*inputs)
        synchronize(self.device)
        phases[name] = {"seconds": time.perf_counter() - began, "peak_gib": peak(self.device), "held_gib": held}
        return result


def allocated(device: torch.device) -> float | None:
    """GiB; a CPU does not tell."""
    return None if device.type == "cpu" else torch.get_device_module(device).memory_allocated(device) / GIB


def peak(device: torch.device) -> float | None:
    return None if device.type == "cpu" else peak_memory(device) / GIB


def reserved(device: torch.device) -> dict:
    """GiB at most of PyTorch's blocks, and now of the device besides these: context and kernels."""
    if device.type == "cpu":
        return {}
    most = torch.get_device_module(device).max_memory_reserved(device)
    return {"reserved_gib": most / GIB, "beside_gib": memory_beside(device) / GIB}


# ------------------------------------------------------------------------------------------------------ the arms


def measure_nano(arm: str, size: str, device: torch.device) -> dict:
    """A row's figures in the real trainer: whole steps, then one phase by phase."""
    with tempfile.TemporaryDirectory() as folder:
        common = {"output_dir": f"{folder}/run", "report_to": ["none"], "device": device.type, "max_steps": 5}
        trainer = RewardGradientTrainer(args=RewardGradientConfig(**common, **settings_of(arm, size)))
        trainer.step(0)
        clean(device)
        seconds = [trainer.step(number)["seconds"] for number in (1, 2, 3)]  # each ends with a number read back
        whole = {"seconds": sorted(seconds)[1], "all": seconds, "peak_gib": peak(device)} | reserved(device)
        batch = trainer.batches.batch(0, 0)
        step = Step(
            trainer.args,
            trainer.fields,
            trainer.decode,
            lambda video: trainer.rewards(video, batch.prompts, **trainer.reward_info(0))[0],
            trainer.masters,
            trainer.optimizer,
            trainer.sigmas,
            trainer.text(batch.prompts, device),
            batch.noise("train"),
            device,
        )
        return whole | {"phases": step.measure(), "extrapolated": False}


def measure_full(arm: str, size: str, device: torch.device, reward: Callable) -> dict:
    (frames, scored, _), settings = FULL[arm], settings_of(arm, size)
    rig = Rig(arm, SIZES[size], frames, STEPS, scored, device, settings=settings)
    limit_memory(device, CAPS_GIB.get(arm))
    grid = rig.shape[2], rig.shape[3] // 2, rig.shape[4] // 2
    like = torch.empty(0, rig.transformer.inner_dim, device=device, dtype=SIZES[size].dtype)
    rig.transformer.pos_embed.position_table(grid, like)  # takes a second on the CPU, once
    score = lambda video: reward(video, PROMPT, **INFO)
    parts = rig.args, rig.fields, rig.decode, score, rig.masters, rig.optimizer, rig.sigmas, rig.cond
    step = Step(*parts, rig.noise("x"), device)
    for _ in range(2):  # the first time loads kernels, and pins host memory
        clean(device)
        phases = step.measure()
    seconds = {name: phase["seconds"] for name, phase in phases.items()}
    whole = sum(seconds.values()) + (STEPS - rig.args.num_grad_steps - 1) * seconds["sampling"]
    peaks = [phase["peak_gib"] for phase in phases.values()]
    measured = {"seconds": whole, "peak_gib": None if None in peaks else max(peaks)} | reserved(device)
    return measured | {"phases": phases, "extrapolated": True}


def predicted(arm: str, size: str, rates: Rates) -> dict:
    """The planner's figures, from the settings alone, without a device."""
    args, card = RewardGradientConfig(**settings_of(arm, size)), model_card("nano" if arm in NANO else CONTENTV_8B)
    if arm in FULL:
        card = card | {name: card[name] | getattr(SIZES[size], name) for name in ("transformer", "vae")}
        card["sampling"] = card["sampling"] | {"fps": 24}
    args = with_sampling(args, card["sampling"])
    plan = Planner(args, card, rates).plan()
    in_gib = lambda sizes: {name: size / GIB for name, size in sizes.items()}
    told = {"peak_gib": plan.memory.most / GIB, "held_gib": in_gib(plan.memory.held)}
    return told | {
        "phases_gib": in_gib(plan.memory.phases),
        "seconds": plan.time.total,
        "phases_seconds": plan.time.parts,
    }


def with_prediction(row: dict, size: str, rates: Rates) -> dict:
    row = row | {"predicted": predicted(row["arm"], size, rates)}
    for key in ("peak_gib", "seconds"):
        if row["measured"][key]:
            row[f"{key}_ratio"] = row["predicted"][key] / row["measured"][key]
    return row


def clean(device: torch.device) -> None:
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        reset_peak_memory(device)


def measured_row(arm: str, size: str, device: torch.device, reward: Callable | None) -> dict:
    """The arm's row; one that fails says why, and the others go on."""
    row = {"arm": arm, "settings": settings_of(arm, size)}
    try:
        found = measure_nano(arm, size, device) if arm in NANO else measure_full(arm, size, device, reward)
        return row | {"measured": found}
    except (RuntimeError, ValueError) as error:  # out of memory is a RuntimeError
        return row | {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    finally:
        limit_memory(device, None)
        clean(device)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arms = ["rates", *NANO, *FULL]
    parser.add_argument("--only", nargs="+", choices=arms, default=arms, metavar="ARM")
    parser.add_argument("--stages", nargs="+", choices=("measure", "predict"), default=["measure", "predict"])
    parser.add_argument("--size", choices=list(SIZES), default="full", help="tiny: everything, for a try on a CPU")
    parser.add_argument("--device", help="default: the accelerator of this machine")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no arm is begun")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already, too")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args(argv)


def measure(arguments: argparse.Namespace) -> None:
    began, device, output = time.perf_counter(), pick_device(arguments.device), arguments.output
    about = environment(device) | {"size": arguments.size, "steps": STEPS}
    old = json.loads(output.read_text()) if output.exists() else {}
    rows = {row["arm"]: row for row in old.get("rows", [])} if old.get("environment") == about else {}
    reward = None
    for arm in arguments.only:
        done = arm in rows and "error" not in rows[arm] and not arguments.again
        if done or time.perf_counter() - began > arguments.limit:
            continue
        if arm in FULL and reward is None:
            reward = make_reward(arguments.size, 8, device)
        if arm == "rates":
            rows[arm] = {"arm": arm, "rates": measure_rates(device).to_dict()}
            clean(device)
        else:
            rows[arm] = measured_row(arm, arguments.size, device, reward)
        write(output, about, list(rows.values()))
        print(brief(rows[arm]), f"after {time.perf_counter() - began:.0f} s", flush=True)


def predict(arguments: argparse.Namespace) -> None:
    result = json.loads(arguments.output.read_text())
    rates = next((Rates(**row["rates"]) for row in result["rows"] if row["arm"] == "rates"), None)
    for i, row in enumerate(result["rows"]):
        if rates and row["arm"] in arguments.only and "measured" in row:
            result["rows"][i] = with_prediction(row, result["environment"]["size"], rates)
            print(brief(result["rows"][i]), flush=True)
    write(arguments.output, result["environment"], result["rows"])


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if "measure" in arguments.stages:
        measure(arguments)
    if "predict" in arguments.stages:
        predict(arguments)


def brief(row: dict) -> str:
    """A row as a line."""
    if "error" in row or "rates" in row:
        return f"{row['arm']}: {row.get('error') or row['rates']}"
    told = f"{row['arm']}:"
    for part in ("measured", "predicted"):
        if part in row:
            gib, seconds = (
                "?" if row[part][key] is None else f"{row[part][key]:.2f}" for key in ("peak_gib", "seconds")
            )
            told += f" {part} {gib} GiB, {seconds} s"
    return told


if __name__ == "__main__":
    main()
