"""The training loop: prompts to videos to scores, and the scores' gradient back into the adapter.

Read `step` and `_reward_gradient` first, an optimizer step and its gradient of one batch; then `rlhf.sampler.rollout`.

Shape legend: B batch, C channels, T frames, H height, W width, S samples of a step, R columns that are logged.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from peft import PeftConfig
from transformers import TrainerCallback

from rewards import RewardError, frames_needed
from rlhf.batches import Batches
from rlhf.calibrate import calibrate, is_calibrated
from rlhf.callbacks import Callbacks
from rlhf.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from rlhf.config import RewardGradientConfig
from rlhf.contentv.flow import flow_sigmas
from rlhf.contentv.pipeline import ContentVPipeline
from rlhf.contentv.wan_decoder import decode_video, saturated_share
from rlhf.decoding import Decoder
from rlhf.device import generator
from rlhf.drift import velocity_distance
from rlhf.evaluate import HeldOut
from rlhf.failures import Skips, not_finite, require_gradient, require_new
from rlhf.fields import Fields
from rlhf.layout import Layout
from rlhf.lora import save_adapter
from rlhf.losses import reward_loss, score, score_metrics
from rlhf.method.options import read_options
from rlhf.methods import gradient_samples, make_plan
from rlhf.optimizer import clip_gradient, due, learning_rate, make_optimizer
from rlhf.parallel import any_process, make_accelerator
from rlhf.prefix import PrefixBuffer
from rlhf.report import reported
from rlhf.restarts import resume_message
from rlhf.run.signals import StopRequest, TrainingInterrupted
from rlhf.run_folder import start_run_folder
from rlhf.sampler import Velocity, Visited, rollout
from rlhf.setup import (
    adapt,
    checked_inputs,
    encode_and_release,
    latent_shape,
    load_base,
    load_prompt_sets,
    mix_rewards,
    open_rewards,
)
from rlhf.trackers import show, tracked
from rlhf.tracking import Cost, RunLog
from rlhf.types import Conditioning
from rlhf.watch import Watch


class RewardGradientTrainer:
    """Trains an adapter on a text-to-video model by back-propagating rewards through its last denoising steps.

    Args:
        model: the generator's name ("nano", a local folder, a hub id; default: args.model), or a `ContentVPipeline`
            without an adapter, which is trained in place; args.model then only says in config.yaml which it was.
        reward_funcs: a reward or several: specs as in the settings, or callables (video, prompts, **info) -> scores.
            Default: args.reward_funcs.
        args: the settings.
        train_dataset, eval_dataset: prompts: strings, or rows with a "prompt". Default: those that args name.
        peft_config: another LoRA than the one that args describe, without dropout.
        opened_rewards: what `rlhf.setup.open_rewards` returned for these args, not to load the rewards twice.
        callbacks: `transformers.TrainerCallback`s, as docs/watching.md describes; they may stop, evaluate and save.

    Raises ConfigError, with all that is wrong at once, or RewardError, before any weight of the model is loaded.
    """

    def __init__(
        self,
        model: str | Path | ContentVPipeline | None = None,
        reward_funcs: str | Callable | list[str | Callable] | None = None,
        args: RewardGradientConfig | None = None,
        train_dataset: Iterable | None = None,
        eval_dataset: Iterable | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        opened_rewards: dict[str, Callable] | None = None,
    ):
        inputs = checked_inputs(model, reward_funcs, args, train_dataset, eval_dataset, peft_config)
        self.args = args = inputs.args
        self.options = read_options(args.method, args.method_kwargs)
        self.accelerator = make_accelerator(args)
        self.layout, self.device = Layout(args, self.accelerator), self.accelerator.device
        self.folder = Path(args.output_dir)
        train_prompts, self.eval_prompts = load_prompt_sets(inputs)
        judges = opened_rewards or open_rewards(args, inputs.rewards, train_prompts, self.device, inputs.pipe)
        self.rewards = mix_rewards(judges, len(inputs.rewards), args)
        self.owns_pipe = inputs.pipe is None
        self.pipe = inputs.pipe or load_base(args, self.device)
        self.masters, self.chosen = adapt(self.pipe, peft_config, args, self.layout)
        self.fields = Fields(self.pipe.transformer, self.masters, args, self.layout)
        self.optimizer = make_optimizer(self.masters.vector, args)
        self.callbacks = Callbacks(callbacks, args, self.accelerator, self.pipe.transformer, self.optimizer)
        self.state = self.callbacks.state
        self.sigmas = flow_sigmas(self.pipe.scheduler, args.num_inference_steps, self.device)
        frames = max(frames_needed(reward, args.num_frames) for reward in self.rewards.rewards.values())
        self.decode, self.prefixes = Decoder(self.pipe.vae, frames, args, self.device), PrefixBuffer(args.rollout_reuse)
        shape, fps = latent_shape(self.pipe, args), self.pipe.sampling.fps
        self.batches = Batches(args, self.layout, train_prompts, shape, fps)
        self.watch = None
        if self.eval_prompts:
            sample, shown = partial(self._sample, self.fields.tuned), partial(show, self.accelerator)
            held_out = HeldOut(sample, judges, self.eval_prompts, shape, args, self.layout, fps, shown)
            self.watch = Watch(held_out, self.rewards.weights, self.pipe, self.masters, self.callbacks.tell)
        self.last_batch, self.skips = None, Skips(args.max_skipped_steps)  # video, prompts, info: `not_finite`
        self.callbacks.tell("on_init_end")

    # ---------------------------------------------------------------------------------------------- the run

    def train(self) -> dict:
        """The whole run: evaluate the base, train, evaluate the tuned model. Returns the content of summary.json. Once.

        Raises TrainingInterrupted after a signal, TrainingError or RewardError where training cannot go on; then
        checkpoints/ holds the last good step.
        """
        require_new(self.optimizer)
        with reported(self.folder, self.accelerator.is_main_process):
            summary = self._train()
        self.callbacks.tell("on_train_end")
        return summary

    def _train(self) -> dict:
        started = time.perf_counter()
        first, saved = self._begin()
        with tracked(self.accelerator, self.args):
            self.callbacks.tell("on_train_begin")
            if self.watch:
                self.watch.begin(partial(self._sample, self.fields.base), first, saved.get("guard"))
            done = self._train_steps(first)
            self._save(done)
            with self.masters.averaged():
                if self.args.load_best_model_at_end:
                    self.watch.load_best(done)
                if self.accelerator.is_main_process:
                    save_adapter(self.pipe, self.masters, self.folder / "adapter")
                if self.watch:
                    return self.watch.finish(done, started)
        self.accelerator.print(f"Nothing was evaluated. The adapter: {self.folder / 'adapter'}")
        return {"seconds": time.perf_counter() - started, "steps": done}

    def _begin(self) -> tuple[int, dict]:
        """Prepare the folder, restore a checkpoint, encode the prompts, calibrate. The first step, and its state."""
        args, accelerator = self.args, self.accelerator
        which, quiet = args.resume_from_checkpoint, not accelerator.is_main_process
        resumed = which and find_checkpoint(which, self.folder, quiet)
        accelerator.wait_for_everyone()  # all have checked the folder before the first one writes there
        if accelerator.is_main_process:
            start_run_folder(args, self.batches.prompts, self.eval_prompts)
        saved = load_checkpoint(resumed, self.masters, self.optimizer) if resumed else {"step": 0}
        if resumed:
            accelerator.print(resume_message(resumed, saved, args))
        self.fields.refresh()
        self.state.global_step = first = saved["step"]
        self.batches.go_on_from(first, saved)
        calibrated = resumed and is_calibrated(self.rewards, args)
        sampled = [] if calibrated else self.batches.prompts_at(0, args.calibrate_rewards)
        prompts = self.batches.from_step(self.prefixes.rollout_of(first, 0)) + self.eval_prompts + sampled
        self.text = encode_and_release(self.pipe, prompts, args, self.device, self.owns_pipe)
        if args.calibrate_rewards:
            sample, shape = partial(self._sample, self.fields.base), self.batches.noise_shape
            calibrate(self.rewards, sample, sampled, shape, args, self.layout, self.batches.info(0))
        return first, saved

    def _train_steps(self, first: int) -> int:
        """The loop over optimizer steps; returns how many are done, counted from the start of the first run."""
        args, log, done = self.args, RunLog(self.accelerator, self.args, first), first
        with StopRequest() as stop, log:
            for name, choice in self.chosen.items():
                log.say(f"{name}: {choice}")
            for done in range(first + 1, args.max_steps + 1):
                self.callbacks.step_begins()
                metrics = None
                try:
                    metrics = self.step(done - 1)
                    self.callbacks.step_ends(done, metrics["epoch"])
                    metrics |= self.watch.look(done, self.callbacks.asked("evaluate")) if self.watch else {}
                except Exception:  # together=False: the others may have failed elsewhere, or not at all
                    self._save(done if metrics else done - 1, together=False)
                    raise
                log.step(metrics)
                self.callbacks.logged(metrics)
                stopping = any_process(self.accelerator, stop.requested)
                if stopping or self.callbacks.asked("save") or due(done, args.save_steps):
                    saved = self._save(done)
                if stopping:
                    raise TrainingInterrupted(saved)
                if stopped := self.watch and self.watch.stop:
                    log.say(stopped)
                if stopped or self.callbacks.asked("training_stop"):
                    break
        return done

    # --------------------------------------------------------------------------------------------- one step

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step on `samples_per_step` videos; returns its metrics. step counts from 0."""
        cost, args = Cost(self.device), self.args
        self.failure = self.last_batch = None
        self.plan = make_plan(args, self.options, self.sigmas, generator("method", args.seed, step))
        gradient = self._anchor_gradient if due(step + 1, args.anchor_steps) else self._reward_gradient
        columns = [gradient(step, micro) for micro in range(args.gradient_accumulation_steps)]
        local_SR = torch.cat([torch.stack([*of_batch.values()], 1) for of_batch in columns])
        scores_SR = self.accelerator.gather(local_SR).cpu()
        self.masters.vector.grad = self.accelerator.reduce(self.masters.vector.grad, "sum")
        norm = self.masters.vector.grad.norm().item()
        place = {"step": step + 1, "epoch": self.batches.samples_before(step + 1) / len(self.batches.prompts)}
        if error := not_finite(scores_SR, norm, self.failure, self.rewards, self.last_batch, self.accelerator):
            self.optimizer.zero_grad(set_to_none=False)
            return place | self.skips.add(error) | cost.so_far()
        self.skips.in_a_row = 0
        require_gradient(norm, self.state.global_step, self.rewards, columns[0])
        clip_gradient(self.masters.vector.grad, norm, args.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.masters.write()
        self.masters.update_average(step)
        self.fields.refresh()
        self.last_batch = None  # a long video is large
        return {
            **place,
            **score_metrics(list(columns[0]), scores_SR),
            "grad_norm": norm,
            "learning_rate": learning_rate(step, args),
            **cost.so_far(),
            "samples": self.batches.samples_before(step + 1),
        }

    def _reward_gradient(self, step: int, micro: int) -> dict[str, torch.Tensor]:
        """One batch, forward and back: its gradient goes to the masters. Its loss, reward and scores, (B,) each."""
        args, plan = self.args, self.plan
        batch = self.batches.batch(self.prefixes.rollout_of(step, micro), micro)
        cond = self.text(batch.prompts, self.device)
        velocity, losses, logged = Visited(self.fields.rolled_out(cond, plan), plan.drift_step), [], None
        for sample in gradient_samples(velocity, batch.noise, plan, partial(self.prefixes.start, step, micro)):
            video = self.decode(self.layout.agreed(sample.latents), step)
            # Unless a batch before has broken the gradient, and is the one to look at.
            if self.last_batch is None or self.masters.vector.grad.sum().isfinite():
                self.last_batch = video.detach(), batch.prompts, self.batches.info(step)
            scores_B, raw = self._score(video, batch.prompts, self.batches.info(step), sample.penalty)
            loss = reward_loss(scores_B)
            self._back_propagate(loss / plan.num_samples)
            losses.append(loss.detach())
            scores = {"reward": scores_B.detach()} | {f"rewards/{name}": raw_B for name, raw_B in raw.items()}
            logged = logged or scores | {"saturated": saturated_share(video)}  # of the first sample
        loss_B = torch.stack(losses).mean().expand(len(batch.prompts))
        if not args.drift_weight:
            return {"loss": loss_B} | logged
        drift_B = self._drift_gradient(cond, *velocity.state, args.drift_weight)
        return {"loss": loss_B + args.drift_weight * drift_B} | logged | {"drift": drift_B}

    def _anchor_gradient(self, step: int, micro: int) -> dict[str, torch.Tensor]:
        """As `_reward_gradient`, without a reward: the drift at a state of the base's own rollout."""
        batch, sigmas, i = self.batches.batch(step, micro), self.plan.sigmas, self.plan.drift_step
        cond = self.text(batch.prompts, self.device)
        state = rollout(self.fields.base(cond), batch.noise("train"), sigmas[: i + 1], [])
        drift_B = self._drift_gradient(cond, state, sigmas[i], 1.0)
        return {"loss": drift_B, "drift": drift_B}

    def _drift_gradient(self, cond: Conditioning, x_BCTHW: torch.Tensor, sigma: torch.Tensor, weight: float):
        """The drift at a state (B,); its gradient, times the weight, goes to the masters."""
        tuned, base = self.fields.tuned(cond), self.fields.base(cond)
        drift_B = self.plan.drift_total * velocity_distance(tuned, base, x_BCTHW, sigma)
        self._back_propagate(weight * drift_B.mean())
        return drift_B.detach()

    def _back_propagate(self, loss: torch.Tensor) -> None:
        (loss / (self.args.gradient_accumulation_steps * self.layout.num_processes)).backward()
        self.masters.collect_grad()

    def _score(self, video: torch.Tensor, prompts: list[str], info: dict, penalty: bool):
        words, strength = self.options.relative_words, self.options.relative_strength
        try:
            return score(self.rewards, video, prompts, info, words, strength, penalty)
        except RewardError as error:  # every process hears of it in `step`, then all of them stop
            self.failure = error
            broken_B = video.mean((1, 2, 3, 4)) * math.nan
            return broken_B, dict.fromkeys(self.rewards.rewards, broken_B.detach())

    # ------------------------------------------------------------------------------- looking at it and saving

    @torch.no_grad()
    def _sample(self, field: Callable[[Conditioning], Velocity], prompts: list[str], noise: torch.Tensor):
        """Whole videos (B, 3, T, H, W) in [0, 1], without gradient."""
        latents = rollout(field(self.text(prompts, self.device)), noise.to(self.device), self.sigmas, [])
        return decode_video(self.pipe.vae, latents, chunk=self.args.decode_chunk)

    def _save(self, done: int, together: bool = True) -> Path:
        """Checkpoint after `done` steps. together: all processes are here, and wait until it is written."""
        folder = self.folder / "checkpoints"
        if self.accelerator.is_main_process:
            state = {"settings": dataclasses.asdict(self.args)} | self.batches.state(done)
            state |= {"guard": self.watch.saved()} if self.watch else {}
            save_checkpoint(folder, done, self.masters, self.optimizer, state, self.args.save_total_limit)
        if together:
            self.accelerator.wait_for_everyone()
            self.callbacks.tell("on_save")
        return folder / f"step-{done}"
