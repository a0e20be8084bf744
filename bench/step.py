"""A full-size reward-gradient step with random weights, arm by arm: ContentV-8B, or Wan2.1.

    python bench/step.py --arms "peers' way" exact --frames 33 --phases step --limit 550
    python bench/step.py --size "wan 1.3B" --frames 81 --output bench/results/wan_1_3b.json
    python bench/tables.py          writes the tables

Rows go to bench/results/step.json one by one; a row replaces that of the same arm, frames, scored
frames and phase. The run stops before a phase that would begin after --limit seconds; the same
command then goes on with what is missing. A phase that does not fit leaves a row that says so, with
the memory that there was. A whole step is not begun if its last step (window) did not fit.

The peers' way is that of VideoX-Fun's train_reward_lora.py (main branch, November 2026) with the
same model and adapter: both branches of guidance in one batch, checkpointing by block, a graph in
every step that is detached where no gradient is wanted, latents and VAE in bfloat16, the VAE's own
decode, of the first latent only. Ours keeps latents in float32. The position table is cached for
both. Time and memory do not depend on the weights.

Prediction: exact at 125 frames 7.0 s for a branch forward and backward (peers 9.3) and 2.05 s
forward (2.46), the whole gradient of 125 frames below 40 GiB; the full step at 33 frames 1.4 times
as fast where nothing is computed twice and blocks are compiled; each use of a rollout after the
first at a seventh of the first one's time.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, free_memory, make_parser, read_rows, scored_frames, show_row, write_rows
from step_arms import (
    CAPS_GIB,
    PEERS,
    SETTINGS,
    SIZES,
    STOCK,
    Rig,
    floor_seconds,
    make_latent_reward,
    make_reward,
)

from rewards.contract import scores_latents
from rlhf.adapter.optimizer import clip_gradient
from rlhf.device import generator, peak_memory, pick_device, reset_peak_memory, synchronize, total_memory
from rlhf.generator.flow import euler_step
from rlhf.generator.wan_decoder import saturated_share, unnormalise
from rlhf.generator.wan_encoder import encode_video
from rlhf.method.losses import score
from rlhf.method.options import is_offline
from rlhf.method.plan import Plan, Sample, gradient_samples, make_plan
from rlhf.method.regression import ScoredRollout
from rlhf.method.rollout import RolloutCache, Velocity, rollout, sample_euler
from rlhf.method.velocity import velocity_field
from rlhf.training.failures import out_of_memory

RESULT = Path(__file__).parent / "results" / "step.json"
OUT_OF_MEMORY = "out of memory"  # how the reason of a row without figures begins
GIB, PROMPT = 2**30, ["a red fox runs through deep snow, slow motion"]
INFO = {"fps": 24, "seed": 0, "step": 0}
LATENT_PHASES = ("sampling", "segment", "step", "update")  # of an arm that decodes nothing
PHASES = ("sampling", "segment", "decode", "decode and back", "window", "step", "update")


@dataclass
class Bench:
    """An arm's rig, a reward and what is done with them."""

    rig: Rig
    reward: torch.nn.Module
    scored: int  # leading frames that the reward is given

    # ----------------------------------------------------------------------------------- the phases

    def sampling(self) -> None:
        """One guided step before the window."""
        rig, x = self.rig, self.rig.noise("train")
        if rig.arm == PEERS:
            self._peers_step(x.to(rig.size.dtype), 0, with_gradient=False)
        else:
            with torch.no_grad():
                self._velocities()[0](x, rig.sigmas[0])

    def segment(self) -> None:
        """One branch of one step, forward and backward, from an arbitrary gradient."""
        rig = self.rig
        x = rig.noise("train").to(rig.size.dtype)
        time_B = torch.full((1,), 500.0, device=rig.device)
        text = rig.cond.prompt_embeds_BLD, rig.cond.pooled_embeds_BP
        (v,) = rig.transformer(x, *text, time_B, return_dict=False)
        v.backward(rig.noise("gradient").to(v.dtype))
        rig.masters.collect_grad()
        rig.masters.vector.grad.zero_()

    def decode(self) -> None:
        """Decode the scored frames."""
        with torch.no_grad():
            self._video(self.rig.noise("train"))

    def encode(self) -> None:
        """Encode a whole video, as each real one is once."""
        B, _, T, H, W = self.rig.shape
        encode_video(self.rig.vae, torch.rand(B, 3, 4 * (T - 1) + 1, 8 * H, 8 * W, device=self.rig.device))

    def decode_and_back(self) -> None:
        """Decode and score forward and backward."""
        z = self.rig.noise("train").requires_grad_()
        video = self._video(z)
        video.backward(torch.ones_like(video))

    def window(self) -> dict:
        """Decode, score and back-propagate the last step, from the same state in every arm."""
        rig, sigmas = self.rig, self.rig.sigmas
        x, last = 0.3 * rig.noise("state"), len(sigmas) - 2
        if rig.arm == PEERS:
            latents = self._peers_step(x.to(rig.size.dtype), last, with_gradient=True)
        else:
            field = guided(rig) if rig.by_hand else rig.fields.window(rig.cond)
            latents = euler_step(x, field(x, sigmas[last]), sigmas[last], sigmas[last + 1])
        video = self._video(latents)
        loss = -self.reward(video, PROMPT, **INFO).mean()
        told = {"saturated": saturated_share(video).item()}
        del video, latents
        loss.backward()
        rig.masters.collect_grad()
        told["gradient"] = rig.masters.vector.grad.clone().cpu()
        rig.masters.vector.grad.zero_()
        return told

    def step(self) -> None:
        """Take a whole optimizer step; with reused rollouts, as many steps as one serves."""
        rig, rollouts = self.rig, RolloutCache(self.rig.args.rollout_reuse)
        if not rig.by_hand and self._plan().regression:
            self._regress(self._plan())
            return self.update()
        for number in range(rig.args.rollout_reuse):
            self._gradient(rollouts, number)
            if rig.options.weight_perturbation:
                masters, unit = rig.masters, rig.masters.vector.grad / rig.masters.vector.grad.norm()
                moved = masters.vector.detach() + rig.options.weight_perturbation * unit
                rig.optimizer.zero_grad(set_to_none=False)
                with masters.use(moved):
                    self._gradient(rollouts, number)
            self.update()

    def _gradient(self, rollouts: RolloutCache, number: int) -> None:
        """Leave the gradient of the batch's samples in the master weights."""
        for sample in self._rollouts(rollouts, number):
            (-self._score(sample).mean()).backward()
            self.rig.masters.collect_grad()

    def update(self) -> None:
        """From an accumulated gradient to the adapter that the modules compute with."""
        rig, gradient = self.rig, self.rig.masters.vector.grad
        clip_gradient(gradient, gradient.norm().item(), 1.0)
        rig.optimizer.step()
        rig.optimizer.zero_grad(set_to_none=False)
        rig.masters.write()

    # ------------------------------------------------------------------------ what they are made of

    def _rollouts(self, rollouts: RolloutCache, number: int):
        rig, last = self.rig, len(self.rig.sigmas) - 2
        if not rig.by_hand:
            (prefix, window), plan = self._velocities(), self._plan()
            noise = rig.noise("train")
            start = rig.noise("real video") if is_offline(rig.args) else rollouts.get(number, 0)
            states = rollout(prefix, window, noise, plan.sigmas, plan.grad_steps, plan.detach_input, start)
            rollouts.put(number, 0, states[plan.window_start])
            yield from gradient_samples(window, states, rig.noise, plan)
        elif rig.arm == STOCK:
            yield Sample(rollout(guided(rig), guided(rig), rig.noise("train"), rig.sigmas, [last])[-1])
        else:
            x = rig.noise("train").to(rig.size.dtype)
            for i in range(last + 1):
                x = self._peers_step(x, i, with_gradient=i == last)
            yield Sample(x)

    def _score(self, sample: Sample) -> torch.Tensor:
        """Return the scores (1,) of a sample, decoded unless the reward is one of latents."""
        if not scores_latents(self.reward):
            rewards = lambda *given, **told: (self.reward(*given, **told), {})
            length = self.rig.options.reward_perturbation
            return score(rewards, self._video(sample.latents), PROMPT, INFO, perturbation=length)[0]
        text, pooled = self.rig.cond.prompt_embeds_BLD, self.rig.cond.pooled_embeds_BP
        return self.reward(sample.scored_latents, PROMPT, sigma=sample.sigma, text=text, pooled=pooled, **INFO)

    def _regress(self, plan: Plan) -> None:
        """Sample, score and back-propagate the loss terms of a regression."""
        rig, fields, cond = self.rig, self.rig.fields, self.rig.cond
        states = sample_euler(self._velocities()[0], rig.noise("train"), plan.sigmas)
        scores_B = self.reward(self._video(states[-1].requires_grad_()), PROMPT, **INFO)
        (gradient,) = torch.autograd.grad(scores_B.sum(), states[-1])
        scored = states, plan.sigmas, scores_B.detach(), gradient, rig.noise
        for term_B in plan.regression.losses(
            ScoredRollout(*scored, fields.window(cond), fields.old(cond), fields.base_vjp(cond))
        ):
            term_B.mean().backward()
            rig.masters.collect_grad()

    def _velocities(self) -> tuple[Velocity, Velocity]:
        """Of the prefix and of the window: of one rollout of ours, or of the stock transformer."""
        rig = self.rig
        if rig.by_hand:
            return guided(rig), guided(rig)
        return rig.fields.tuned(rig.cond), rig.fields.window(rig.cond)

    def _peers_step(self, x: torch.Tensor, i: int, with_gradient: bool) -> torch.Tensor:
        """Return VideoX-Fun's velocity: x in bfloat16, and a graph also where none is needed."""
        rig, sigmas = self.rig, self.rig.sigmas
        v = guided(rig, together=True)(x, sigmas[i])
        v = v if with_gradient else v.detach()
        return (x.float() + (sigmas[i + 1] - sigmas[i]) * v.float()).to(x.dtype)

    def _video(self, latents: torch.Tensor) -> torch.Tensor:
        """(1, 3, scored, H, W) in [0, 1], float32."""
        rig = self.rig
        if not rig.by_hand:
            return rig.decode(latents, 0)
        needed = 1 + -(-(self.scored - 1) // 4)
        z = unnormalise(rig.vae, latents[:, :, :needed].float()).to(rig.vae.dtype)
        video = rig.vae.decode(z, return_dict=False)[0]
        return (video.float().clamp(-1, 1) / 2 + 0.5).clamp(0, 1)

    def _plan(self):
        rig = self.rig
        return make_plan(rig.args, rig.options, rig.sigmas, generator("bench", "plan"))


def guided(rig: Rig, together: bool = False) -> Velocity:
    """Return the stock transformer's guided velocity."""
    return velocity_field(rig.transformer, rig.cond, rig.args.guidance_scale, together=together)


# ---------------------------------------------------------------------------------------- measuring


def measure(work: Callable[[], dict | None], device: torch.device, repeats: int, warm: bool) -> dict:
    """Return median time and peak memory; not warm: after a separate first call."""
    seconds, peaks, told = [], [], None
    try:
        for _ in range(repeats if warm else 1 + repeats):
            reset_peak_memory(device)
            synchronize(device)
            began = time.perf_counter()
            told = work()
            synchronize(device)
            seconds.append(time.perf_counter() - began)
            peaks.append(peak_memory(device) / GIB)
    except RuntimeError as error:  # of the device, or of pinned host memory
        if not out_of_memory(error):
            raise
        return {"skipped": OUT_OF_MEMORY}
    first = {} if warm else {"first_seconds": seconds[0]}
    timed, peaks = seconds[-repeats:], peaks[-repeats:]
    found = {"seconds": statistics.median(timed), "all": timed, "peak_gib": max(peaks)}
    return found | first | (told or {})


def compare(row: dict, gradients: Path, frames: int, scored: int) -> dict:
    """Return cosine and length against the references, and keep a reference's gradient."""
    found = row.pop("gradient")
    for reference in (STOCK, PEERS):
        name = "stock" if reference == STOCK else "peers"
        path = gradients / f"{name}-{len(found)}-{frames}-{scored}.pt"
        if row["arm"] == reference:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(found, path)
        elif path.exists():
            expected = torch.load(path, weights_only=True).double()
            cosine = torch.cosine_similarity(found.double(), expected, dim=0).item()
            length = (found.norm() / expected.norm()).item()
            row[f"against {reference}"] = {"cosine": cosine, "length": length}
    return row


def run_arm(arm: str, phases: list[str], scored: int, reward, arguments, device, out_of_time: Callable):
    """Yield the rows of the phases that begin in time."""
    frames, failed = arguments.frames, None
    told = {"arm": arm, "frames": frames, "scored": scored, "settings": SETTINGS[arm]}
    limit_gib = CAPS_GIB.get(arm, (total_memory(device) or 0) / GIB)
    try:
        rig = Rig(arm, SIZES[arguments.size], frames, arguments.steps, scored, device)
        of_latents = rig.args.method == "prfl"
        bench = Bench(rig, make_latent_reward(rig) if of_latents else reward(), scored)
    except (ImportError, ValueError) as error:  # an option needs a library or device
        failed = {"skipped": str(error)}
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        failed = {"skipped": f"{OUT_OF_MEMORY}: the weights", "limit_gib": limit_gib}
    if failed:
        yield from (told | {"phase": phase} | failed for phase in phases)
        return
    phases, no_window = [phase for phase in phases if not of_latents or phase in LATENT_PHASES], {}
    limit_memory(device, CAPS_GIB.get(arm))
    for phase in phases:
        if out_of_time():
            break
        row = told | {"phase": phase} | rig.chosen
        row |= {"steps": arguments.steps} if phase == "step" else {}
        warm = phase == "step" and ({"sampling", "window"} <= set(phases) or "segment" in phases)  # run before
        if phase == "step" and no_window:
            row |= no_window
        else:
            row |= measure(getattr(bench, phase.replace(" ", "_")), device, arguments.repeats, warm)
        if "skipped" in row:
            row["limit_gib"] = limit_gib
            no_window = {"skipped": f"{OUT_OF_MEMORY}: its last step"} if phase == "window" else no_window
            free_memory(device)
        if phase == "step" and "seconds" in row:
            row["seconds_per_gradient"] = row["seconds"] / rig.args.rollout_reuse
        if arguments.size == "full" and (least := floor_seconds(rig, phase)):
            row["floor_seconds"] = least
        row = compare(row, arguments.gradients, frames, scored) if "gradient" in row else row
        show_row(row)
        yield row
    limit_memory(device, None)


def limit_memory(device: torch.device, gib: float | None) -> None:
    """Let PyTorch take no more of the device than that; None: all of it."""
    if device.type == "cpu":
        return
    torch.accelerator.empty_cache()
    fraction = 1.0 if gib is None else gib * GIB / total_memory(device)
    torch.get_device_module(device).set_per_process_memory_fraction(fraction)


def key(row: dict) -> tuple:
    """Return what identifies a row."""
    return row["arm"], row["frames"], row["scored"], row["phase"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the command's flags."""
    parser = make_parser(__doc__)
    parser.add_argument("--arms", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="ARM")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--scored", default="first", help="frames the reward is given: first, all or a number")
    on_demand = "encode"  # of real videos, once in a run
    parser.add_argument("--phases", nargs="+", choices=[*PHASES, on_demand], default=list(PHASES), metavar="PHASE")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps of a whole step")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--device", help="default: the accelerator of this machine")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no phase is begun")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already, too")
    parser.add_argument("--gradients", type=Path, default=Path(__file__).parent / "runs" / "step", help="references")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    began, arguments = time.perf_counter(), parse(argv)
    device = pick_device(arguments.device)
    size = SIZES[arguments.size]
    about = environment(device) | {"size": arguments.size, "height": size.height, "width": size.width}
    rows = read_rows(arguments.output, about, key)
    scored = scored_frames(arguments.scored, arguments.frames)
    reward = functools.cache(lambda: make_reward(arguments.size, scored, device))
    late = lambda: time.perf_counter() - began > arguments.limit
    for arm in arguments.arms:
        done = {phase for *place, phase in rows if place == [arm, arguments.frames, scored]}
        missing = [phase for phase in arguments.phases if arguments.again or phase not in done]
        if not missing or late():
            continue
        for row in run_arm(arm, missing, scored, reward, arguments, device, late):
            rows[key(row)] = row
            write_rows(arguments.output, about, rows.values())
        free_memory(device)


if __name__ == "__main__":
    main()
