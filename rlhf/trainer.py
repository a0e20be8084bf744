"""The training loop: prompts to videos to scores, and the scores' gradient back into the adapter.

Shape legend: B batch, C channels, T frames, H height, W width, R rewards, S samples of an optimizer step.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from peft import PeftConfig
from transformers import TrainerCallback, TrainerControl, TrainerState

from rewards import RewardError, RewardMix, frames_needed, reward_name
from rlhf.calibrate import CALIBRATION, calibrate
from rlhf.checkpoint import StopRequest, TrainingInterrupted, find_checkpoint, load_checkpoint, save_checkpoint
from rlhf.checks import check_config, open_rewards
from rlhf.compare import summarise
from rlhf.config import RewardGradientConfig
from rlhf.contentv.loading import load_pipeline
from rlhf.contentv.pipeline import ContentVPipeline, flow_sigmas
from rlhf.contentv.wan_decoder import decode_video
from rlhf.evaluate import HeldOut
from rlhf.grad_steps import choose_grad_steps
from rlhf.lora import Masters, adapter_off, add_adapter, lora_config, save_adapter
from rlhf.losses import reward_loss
from rlhf.parallel import any_process, make_accelerator
from rlhf.prompts import as_prompts, load_prompts, prompt_positions
from rlhf.report import finish_report
from rlhf.run_folder import start_run_folder
from rlhf.sampler import draw_noise, rollout
from rlhf.text import encode_prompts
from rlhf.tracking import RunLog, write_results

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class TrainingError(RuntimeError):
    """Training cannot go on: why, and what to do. checkpoints/ holds the last good step."""


class RewardGradientTrainer:
    """Trains an adapter on a text-to-video model by back-propagating rewards through its last denoising steps.

    Args:
        model: what names the generator ("nano", a local folder, a hub id; default: args.model) or a `ContentVPipeline`,
            which is trained in place; args.model then only says in config.yaml which it was.
        reward_funcs: a reward or several: specs as in the settings, or callables (video, prompts, **info) -> scores.
            Default: args.reward_funcs.
        args: the settings.
        train_dataset, eval_dataset: prompts: strings, or rows with a "prompt". Default: those that args name.
        peft_config: another adapter than the LoRA that args describe.
        opened_rewards: what `rlhf.checks.open_rewards` returned for these args, not to load the rewards twice.
        callbacks: `transformers.TrainerCallback`s, told on_train_begin, on_step_end, on_log, on_evaluate, on_save and
            on_train_end; `control.should_evaluate`, `should_save` and `should_training_stop` are obeyed.

    Raises ConfigError, with everything that is wrong at once, and RewardError for a reward that cannot train, before
    any weight of the model is loaded.
    """

    def __init__(
        self,
        model: str | ContentVPipeline | None = None,
        reward_funcs: str | Callable | list[str | Callable] | None = None,
        args: RewardGradientConfig | None = None,
        train_dataset: Iterable | None = None,
        eval_dataset: Iterable | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        opened_rewards: dict[str, Callable] | None = None,
    ):
        args = args or RewardGradientConfig()
        args = dataclasses.replace(args, model=model if isinstance(model, str) else args.model)
        pipe = None if model is None or isinstance(model, str) else model
        rewards = args.reward_funcs if reward_funcs is None else reward_funcs
        rewards = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
        args.reward_funcs = [r if isinstance(r, str) else reward_name(r) for r in rewards]
        train_prompts = None if train_dataset is None else as_prompts(train_dataset)
        eval_prompts = None if eval_dataset is None else as_prompts(eval_dataset)
        self.args = args = check_config(args, pipe, rewards, train_prompts, eval_prompts)

        self.accelerator = make_accelerator(args)
        self.device = self.accelerator.device
        self.folder = Path(args.output_dir)
        self.train_prompts = train_prompts or load_prompts(
            args.prompts, args.base_dir, args.num_train_prompts, args.seed
        )
        if eval_prompts is None and args.eval_prompts:
            eval_prompts = load_prompts(args.eval_prompts, args.base_dir, args.num_eval_prompts, args.eval_seed)
        self.eval_prompts = (eval_prompts or [])[: args.num_eval_prompts]
        judges = opened_rewards or open_rewards(args, rewards, self.train_prompts, self.device, pipe)
        self.rewards = RewardMix(
            dict(list(judges.items())[: len(rewards)]),
            args.reward_weights,
            args.normalise_rewards,
            args.reward_caps,
            args.reward_targets,
            args.balance_reward_gradients,
        )
        self.owns_pipe = pipe is None
        self.pipe = pipe or load_pipeline(args.model, dtype=_dtype(args.dtype), device=self.device)
        self._adapt(peft_config)
        self.held_out = None
        if self.eval_prompts:
            fps, shape = self.pipe.sampling.fps, self.latent_shape
            self.held_out = HeldOut(self._make_videos, judges, self.eval_prompts, shape, args, self.accelerator, fps)
        self.callbacks, self.control = callbacks or [], TrainerControl()
        self.state = TrainerState(max_steps=args.max_steps)

    def _adapt(self, peft_config: PeftConfig | None) -> None:
        """The decoder frozen, in evaluation mode; the adapter and its optimizer; the rollout's plan."""
        args, pipe = self.args, self.pipe
        pipe.vae.to(self.device).float().requires_grad_(False).eval()
        adapter = peft_config or lora_config(args.lora_rank, args.lora_alpha, args.lora_target_modules)
        add_adapter(pipe.transformer.to(self.device), adapter, args.seed)
        if args.gradient_checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
        self.masters = Masters(pipe.transformer)
        betas = (args.adam_beta1, args.adam_beta2)
        self.optimizer = torch.optim.AdamW(
            [self.masters.vector], betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay, fused=True
        )
        self.sigmas = flow_sigmas(pipe.scheduler, args.num_inference_steps, self.device)
        self.grad_steps = choose_grad_steps("last", args.num_inference_steps, args.num_grad_steps)
        self.frames = max(frames_needed(reward, args.num_frames) for reward in self.rewards.rewards.values())
        latent_frames = (args.num_frames - 1) // pipe.vae_scale_factor_temporal + 1
        size = (args.height // pipe.vae_scale_factor, args.width // pipe.vae_scale_factor)
        self.latent_shape = (pipe.transformer.config.in_channels, latent_frames, *size)

    # ---------------------------------------------------------------------------------------------- the run

    def train(self) -> dict:
        """The whole run: evaluate the base, train, evaluate the tuned model. Returns the content of summary.json.

        Raises TrainingInterrupted after a signal, TrainingError or RewardError where training cannot go on; then
        checkpoints/ holds the last good step.
        """
        started, held_out = time.perf_counter(), self.held_out
        first = self._begin()
        if held_out:
            with adapter_off(self.pipe.transformer):
                base = held_out.base(resumed=bool(self.args.resume_from_checkpoint))
        done = self._train_steps(first)
        self._save(done)
        if self.accelerator.is_main_process:
            save_adapter(self.pipe, self.masters, self.folder / "adapter")
        summary = {"seconds": time.perf_counter() - started, "steps": done}
        if held_out:
            tuned = held_out.evaluate("tuned", done)
            summary = summarise(base, tuned, list(self.rewards.rewards), time.perf_counter() - started, done)
            if self.accelerator.is_main_process:
                tuned.save(self.folder / "evaluation" / "tuned.safetensors")
                write_results(self.folder, summary, tuned.prompts, base.videos_NCTHW, tuned.videos_NCTHW)
        if self.accelerator.is_main_process:
            finish_report(self.folder)
        self._tell("on_train_end")
        return summary

    def _begin(self) -> int:
        """Prepare the run folder, restore a checkpoint, encode the prompts. The first step to do."""
        args, accelerator = self.args, self.accelerator
        resumed = args.resume_from_checkpoint and find_checkpoint(args.resume_from_checkpoint, self.folder)
        accelerator.wait_for_everyone()  # all have checked the folder before the first one writes there
        if accelerator.is_main_process:
            start_run_folder(args)
        first = load_checkpoint(resumed, self.masters, self.optimizer)["step"] if resumed else 0
        self.state.global_step = first
        places = range(first * self.samples_per_step, args.max_steps * self.samples_per_step)
        base_prompts = self._base_prompts(resumed)
        self._encode(
            [self.train_prompts[i] for i in self._positions(places.start, len(places))]
            + self.eval_prompts
            + base_prompts
        )
        if args.calibrate_rewards:
            with adapter_off(self.pipe.transformer):
                shape, info = self.latent_shape, self._info(0)
                calibrate(self.rewards, self._make_videos, base_prompts, shape, args, accelerator, info)
        return first

    def _base_prompts(self, resumed) -> list[str]:
        """What calibration samples: the first training prompts; none where the resumed run has done it."""
        if resumed and (self.folder / CALIBRATION).is_file():
            return []
        return [self.train_prompts[i] for i in self._positions(0, self.args.calibrate_rewards)]

    def _info(self, step: int) -> dict:
        """What rewards are told besides videos and prompts."""
        return {"fps": self.pipe.sampling.fps, "seed": self.args.seed, "step": step}

    def _encode(self, prompts: list[str]) -> None:
        """Embed the prompts of this run; the encoders, no longer needed, leave the device."""
        args = self.args
        if prompts:  # none for a finished run that is resumed
            self.text = encode_prompts(self.pipe, prompts, args.negative_prompt, args.max_sequence_length)
        if self.owns_pipe:
            for name in ENCODERS:
                getattr(self.pipe, name).to("cpu")

    def _train_steps(self, first: int) -> int:
        """The loop over optimizer steps; returns how many are done, counted from the start of the first run."""
        args, log, done = self.args, RunLog(self.accelerator, self.args, first), first
        self._tell("on_train_begin")
        with StopRequest() as stop, log:
            for done in range(first + 1, args.max_steps + 1):
                try:
                    metrics = self.step(done - 1)
                except Exception:
                    self._save(done - 1, together=False)  # the others may have failed elsewhere, or not at all
                    raise
                self.state.global_step = done
                self.control.should_evaluate = self.control.should_save = False
                self._tell("on_step_end")
                metrics |= self._look(done)
                log.step(metrics)
                self.state.log_history.append(metrics)
                self._tell("on_log", logs=metrics)
                stopping = any_process(self.accelerator, stop.requested)
                if stopping or self.control.should_save or _due(done, args.save_steps):
                    saved = self._save(done)
                if stopping:
                    raise TrainingInterrupted(saved)
                if self.control.should_training_stop:
                    break
        return done

    # --------------------------------------------------------------------------------------------- one step

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step on `samples_per_step` videos; returns its metrics. step counts from 0."""
        began, args = time.perf_counter(), self.args
        self.failure: RewardError | None = None
        local_SR = torch.cat([self._accumulate(step, micro) for micro in range(args.gradient_accumulation_steps)])
        scores_SR = self.accelerator.gather(local_SR).cpu()
        self._require_finite(scores_SR)
        self.masters.vector.grad = self.accelerator.reduce(self.masters.vector.grad, "sum")
        grad_norm = self._clip()
        rate = learning_rate(step, args)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.masters.write()
        self.last_batch = None  # a long video is large
        return {
            "step": step + 1,
            "epoch": (step + 1) * self.samples_per_step / len(self.train_prompts),
            **self._score_metrics(scores_SR),
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "seconds": time.perf_counter() - began,
            "samples": (step + 1) * self.samples_per_step,
        }

    def _accumulate(self, step: int, micro: int) -> torch.Tensor:
        """One batch, forward and back: its gradient goes to the masters. Its loss, reward and scores, (B, 2 + R)."""
        args, batches = self.args, self.args.gradient_accumulation_steps * self.accelerator.num_processes
        prompts, samples = self._batch(step, micro)
        noise = draw_noise(self.latent_shape, args.seed, "train", samples).to(self.device)
        cond = self.text(prompts, self.device)
        latents = rollout(self.pipe.transformer, noise, cond, self.sigmas, args.guidance_scale, self.grad_steps)
        video = decode_video(self.pipe.vae, latents, self.frames, args.decode_chunk, args.decode_checkpoint)
        self.last_batch = video.detach(), prompts
        try:
            scores_B, breakdown = self.rewards(video, prompts, **self._info(step))
        except RewardError as error:  # every process hears of it in `step`, then all of them stop
            self.failure = error
            return torch.full((len(prompts), 2 + len(self.rewards.rewards)), math.nan, device=self.device)
        loss, _ = reward_loss(scores_B)
        (loss / batches).backward()
        self.masters.collect_grad()
        return torch.stack([loss.detach().expand_as(scores_B), scores_B.detach(), *breakdown.values()], 1)

    def _batch(self, step: int, micro: int) -> tuple[list[str], list[tuple[int, int]]]:
        """This process's prompts and the keys of their noise: (step, place in the step), on any number of processes."""
        size = self.args.per_device_train_batch_size
        start = (micro * self.accelerator.num_processes + self.accelerator.process_index) * size
        rows = self._positions(step * self.samples_per_step + start, size)
        return [self.train_prompts[row] for row in rows], [(step, start + i) for i in range(size)]

    def _positions(self, start: int, count: int) -> list[int]:
        return prompt_positions(len(self.train_prompts), self.args.seed, start, count)

    @property
    def samples_per_step(self) -> int:
        """Videos of one optimizer step, over all processes."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes

    def _score_metrics(self, scores_SR: torch.Tensor) -> dict[str, float]:
        means, stds = scores_SR.mean(0).tolist(), scores_SR.std(0, correction=0).tolist()
        metrics = {"loss": means[0], "reward": means[1]}
        for name, mean, std in zip(self.rewards.rewards, means[2:], stds[2:], strict=True):
            metrics |= {f"rewards/{name}": mean, f"rewards/{name}_std": std}
        return metrics

    def _clip(self) -> float:
        """Scale the gradient to max_grad_norm if it is longer; its norm before. Raises TrainingError for 0 or NaN."""
        norm = self.masters.vector.grad.norm().item()
        if not math.isfinite(norm):
            raise TrainingError(self._blame(norm))
        if norm == 0 and not self.rewards.caps:  # beyond a cap nothing is to be learnt
            raise TrainingError(
                f"The gradient at the adapter is exactly zero after {self.state.global_step} steps, expected a number "
                "above 0: nothing would be learnt. Look for a reward that is saturated on these videos."
            )
        if self.args.max_grad_norm and norm > self.args.max_grad_norm:
            self.masters.vector.grad *= self.args.max_grad_norm / norm
        return norm

    def _require_finite(self, scores_SR: torch.Tensor) -> None:
        if not torch.isfinite(scores_SR).all():
            raise self.failure or TrainingError("A reward failed on another process; its message says which and why.")

    def _blame(self, norm: float) -> str:
        """Which reward's own gradient at the last videos is not finite, asked of each alone."""
        video, prompts = self.last_batch
        guilty = []
        for name, reward in self.rewards.rewards.items():
            pixels = video.clone().requires_grad_()
            scores_B, _ = RewardMix({name: reward})(pixels, prompts, **self._info(self.state.global_step))
            (grad,) = torch.autograd.grad(scores_B.sum(), pixels)
            if any_process(self.accelerator, not torch.isfinite(grad).all()):
                guilty.append(name)
        source = f"the reward {', '.join(guilty)}" if guilty else "no reward, so the decoder or the transformer"
        return (
            f"The gradient at the adapter has norm {norm} in step {self.state.global_step + 1}, expected a finite "
            f"number; it comes from {source}. Look for sqrt, norm or log at zero there, lower learning_rate, or use "
            "dtype float32."
        )

    # ------------------------------------------------------------------------------- looking at it and saving

    def _look(self, done: int) -> dict[str, float]:
        """Evaluate or sample if this is a step for it; the evaluation's means as metrics."""
        args = self.args
        if self.held_out and (self.control.should_evaluate or _due(done, args.eval_steps)):
            evaluation = self.held_out.evaluate(f"step {done}", done)
            metrics = {f"eval/{name}": mean for name, mean in evaluation.means().items()}
            self._tell("on_evaluate", metrics=metrics)
            return metrics
        if self.held_out and _due(done, args.sample_steps) and done < args.max_steps:
            self.held_out.sample(done)
        return {}

    @torch.no_grad()
    def _make_videos(self, prompts: list[str], noise: torch.Tensor) -> torch.Tensor:
        """Whole videos (B, 3, T, H, W) in [0, 1], without gradient."""
        args, cond = self.args, self.text(prompts, self.device)
        latents = rollout(self.pipe.transformer, noise.to(self.device), cond, self.sigmas, args.guidance_scale, [])
        return decode_video(self.pipe.vae, latents, chunk=args.decode_chunk)

    def _save(self, done: int, together: bool = True) -> Path:
        """Checkpoint after `done` steps. together: all processes are here, and wait until it is written."""
        if self.accelerator.is_main_process:
            state = {"settings": dataclasses.asdict(self.args), "processes": self.accelerator.num_processes}
            folder = self.folder / "checkpoints"
            save_checkpoint(folder, done, self.masters, self.optimizer, state, self.args.save_total_limit)
        if together:
            self.accelerator.wait_for_everyone()
            self._tell("on_save")
        return self.folder / "checkpoints" / f"step-{done}"

    def _tell(self, event: str, **kwargs) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.args, self.state, self.control, model=self.pipe.transformer, **kwargs)


def learning_rate(step: int, args: RewardGradientConfig) -> float:
    """Of optimizer step `step`, from 0: linear warm-up, then constant or linear to 0 at max_steps."""
    warm = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
    if args.lr_scheduler_type == "constant":
        return args.learning_rate * warm
    return args.learning_rate * min(warm, (args.max_steps - step) / max(1, args.max_steps - args.warmup_steps))


def _due(done: int, every: int) -> bool:
    """Whether something that happens each `every` steps, 0 for never, happens after `done` of them."""
    return every > 0 and done % every == 0


def _dtype(name: str) -> torch.dtype | None:
    """None, for "auto", leaves the choice to the loader."""
    return None if name == "auto" else getattr(torch, name)
