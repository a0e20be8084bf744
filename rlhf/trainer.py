"""The training loop: prompts to videos to scores, and their gradient back into the adapter.

Read `step`, `_reward_gradient` and `_sample_gradient` first, then `rlhf.method.rollout.rollout`.

Shape legend: B batch, C channels, T frames, H height, W width, S samples of a step, R logged
columns.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from peft import PeftConfig
from transformers import TrainerCallback

from rlhf.adapter.lora_file import INITIAL_KEY
from rlhf.adapter.lora_weights import ADAPTER_FILE
from rlhf.adapter.optimizer import clip_gradient, is_due, learning_rate, make_optimizer, slow_updates, unreached_steps
from rlhf.config import RewardGradientConfig
from rlhf.device import generator
from rlhf.distributed.accelerator import any_process, describe_launch, make_accelerator
from rlhf.distributed.layout import Layout
from rlhf.evaluation.held_out import MakeVideos
from rlhf.generator.flow import flow_sigmas
from rlhf.generator.pipeline import VideoPipeline
from rlhf.method.decode import Sampled, VideoSampler
from rlhf.method.drift import velocity_distance
from rlhf.method.losses import reward_loss, score_metrics
from rlhf.method.options import SCORES_ALONE, read_options
from rlhf.method.plan import Plan, Sample, gradient_samples, make_plan
from rlhf.method.regression import ScoredRollout
from rlhf.method.rollout import Velocity, rollout, sample_euler
from rlhf.prompts import shared_message, unread_message
from rlhf.report import report_at_end
from rlhf.report.summary import remove_results
from rlhf.run.checkpoint import find_checkpoint, load_checkpoint, read_state, save_checkpoint
from rlhf.run.folder import start_run_folder
from rlhf.run.lock import lock_folder
from rlhf.run.metrics import Cost, RunLog, seconds_before
from rlhf.run.resume import describe_inputs, restart_message, resume_message
from rlhf.run.signals import StopRequest, TrainingInterrupted
from rlhf.run.trackers import run_trackers
from rlhf.training import setup
from rlhf.training.batches import BatchResult, finish_in_turn, first_failure
from rlhf.training.calibrate import calibrate, restore_calibration
from rlhf.training.callbacks import Callbacks
from rlhf.training.failures import SkippedSteps, non_finite_error, require_gradient, require_untrained
from rlhf.training.rewards import choose_method, mix_rewards, open_rewards
from rlhf.types import Conditioning


class RewardGradientTrainer:
    """Trains a video model's adapter by back-propagating rewards through denoising steps.

    Args:
        model: the generator's name ("nano", a local folder, a hub id; default: args.model), or a
            `VideoPipeline` without an adapter, which is trained in place; args.model is then
            only written to config.yaml.
        reward_funcs: a reward or several: specs as in the settings, or callables (video, prompts,
            **info) -> scores. Default: args.reward_funcs.
        args: the settings.
        train_dataset, eval_dataset: prompts: strings, or rows with a "prompt", whose other fields
            rewards get as info["rows"]. Default: those that args name.
        peft_config: a LoRA in place of the one that args describe, without dropout.
        opened_rewards: the result of `rlhf.training.rewards.open_rewards` for these args, so that
            rewards load once.
        callbacks: `transformers.TrainerCallback`s, as docs/watching.md describes; they may stop,
            evaluate and save.

    Raises ConfigError, with all problems at once, or RewardError, before any weight of the model is
    loaded.
    """

    def __init__(
        self,
        model: str | Path | VideoPipeline | None = None,
        reward_funcs: str | Callable | list[str | Callable] | None = None,
        args: RewardGradientConfig | None = None,
        train_dataset: Iterable | None = None,
        eval_dataset: Iterable | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        opened_rewards: dict[str, Callable] | None = None,
    ):
        inputs = setup.check_inputs(model, reward_funcs, args, train_dataset, eval_dataset, peft_config)
        self.args = args = inputs.args
        self.folder = Path(args.output_dir)
        self.accelerator = make_accelerator(args)
        self.accelerator.print(describe_launch(self.accelerator, setup.describe_precision(args, inputs.pipe)))
        self.layout, self.device = Layout(args, self.accelerator), self.accelerator.device
        train_prompts, self.eval_prompts = prompts = inputs.train_prompts, inputs.eval_prompts
        setup.require_same_run(self.layout, train_prompts, args, inputs.videos)
        judges = opened_rewards or open_rewards(args, inputs.rewards, *prompts, self.device, inputs.pipe)
        self.args, chosen = args, _ = choose_method(args, dict(list(judges.items())[: len(inputs.rewards)]))
        self.options = read_options(args.method, args.method_kwargs)
        self.drift_weight = args.drift_weight or self.options.negative_drift_weight
        self.rewards = mix_rewards(judges, len(inputs.rewards), args)

        base = None if inputs.pipe else setup.find_base(args, self.device)
        self.pipe = inputs.pipe or base.open_pipeline()
        self.batches = setup.make_batches(train_prompts, self.pipe, args, self.layout)
        self.data = setup.make_anchor_data(inputs.videos, self.pipe, args, self.layout)
        self.rollouts = setup.make_rollouts(args, self.data, self.batches)
        self.stop, self.skipped = StopRequest(self.accelerator.is_main_process), SkippedSteps(args.max_skipped_steps)
        self.inputs = describe_inputs(args, train_prompts, self.eval_prompts, self.data.captions)
        checkpoint, self.resumed = self._find_checkpoint()
        prompts = self.batches.prompts_at(0, args.calibrate_rewards)
        calibrated = bool(args.resume_from_checkpoint) and restore_calibration(self.rewards, args, prompts)
        self.calibration_prompts = prompts if any_process(self.accelerator, not calibrated) else []
        left = self.batches.prompts_from_rollout(self.rollouts.rollout_index(self.resumed["step"], 0))
        prompts = left + self.eval_prompts + self.calibration_prompts + self.data.captions
        self.text = setup.encode(self.pipe, prompts, args, self.device, base)

        if base:  # the text encoders are gone by now
            setup.load_base(base, self.pipe, args, self.device)
        self.masters, self.choices = setup.prepare_model(self.pipe, peft_config, args, self.layout, inputs.initial)
        self.choices |= chosen
        self.data.encode(self.pipe.vae)
        self.optimizer = make_optimizer(self.masters.vector, args)
        every = {"anchor_steps": args.anchor_steps, "anchor_data_steps": self.options.anchor_data_steps}
        rare = unreached_steps(args.max_steps, **every, eval_steps=args.eval_steps)
        for remark in (*slow_updates(args, self.masters.vector.numel()), *rare):
            self.accelerator.print(remark)
        if shared := shared_message(train_prompts, self.eval_prompts):
            self.accelerator.print(shared)
        self.fields = setup.make_fields(self.pipe, self.masters, args, self.layout)
        self.sigmas = flow_sigmas(self.pipe.scheduler, args.num_inference_steps, self.device)
        self.scorer = setup.make_scorer(self.pipe, self.rewards, args, self.layout)
        self.callbacks = Callbacks(callbacks, args, self.accelerator, self.pipe.transformer, self.optimizer)
        self.state = self.callbacks.state
        self.state.global_step = self.resumed["step"]
        if checkpoint:
            load_checkpoint(checkpoint, self.masters, self.optimizer)
        self.sample_base, sample_tuned = map(self._video_sampler, (self.fields.base, self.fields.tuned))
        self.monitor = None
        if self.eval_prompts:
            held_out = setup.make_held_out(sample_tuned, judges, self.eval_prompts, self.pipe, args, self.layout)
            self.monitor = setup.make_monitor(held_out, self.rewards, self.masters, self.callbacks.notify, args)
        self.callbacks.notify("on_init_end")

    # ------------------------------------------------------------------------------------ one step

    def step(self, step: int) -> dict[str, float]:
        """Take optimizer step `step`, from 0, on `samples_per_step` videos; return its metrics."""
        cost, args = Cost(self.device), self.args
        plan = make_plan(args, self.options, self.sigmas, generator("method", args.seed, step))
        with self.stop.interruptible():
            results, norm = self._gradient(step, plan)
            columns = [result.columns for result in results]
            if self.options.weight_perturbation and 0 < norm < math.inf:
                grad, masters = self.masters.vector.grad, self.masters
                moved = masters.vector.detach() + self.options.weight_perturbation / norm * grad
                self.optimizer.zero_grad(set_to_none=False)
                with masters.use(moved):
                    results, norm = self._gradient(step, plan)

        names = list(columns[0])
        scores_SR = torch.cat([torch.stack([*column.values()], 1) for column in columns])
        scores_SR = self.accelerator.gather(scores_SR).cpu()
        progress = {"step": step + 1, "epoch": self.batches.epochs_before(step + 1)}
        suspect, error = first_failure(results)
        if error := non_finite_error(scores_SR, norm, error, self.rewards, suspect, self.accelerator):
            self.optimizer.zero_grad(set_to_none=False)
            return progress | self.skipped.add(error) | cost.elapsed()
        self.skipped.in_a_row = 0
        if args.method not in SCORES_ALONE:  # there, equal scores teach nothing, and are no fault
            require_gradient(norm, self.state.global_step, self.rewards, names)

        self._update(step, norm)
        return {
            **progress,
            **score_metrics(names, scores_SR),
            "grad_norm": norm,
            "learning_rate": learning_rate(step, args),
            **cost.elapsed(),
            "samples": self.batches.samples_before(step + 1),
        }

    def _gradient(self, step: int, plan: Plan) -> tuple[list[BatchResult], float]:
        """Leave the gradient of all batches and processes in the master weights.

        Returns the results of this process, one a batch, and the gradient's norm.
        """
        is_anchor, micros = is_due(step + 1, self.args.anchor_steps), range(self.args.gradient_accumulation_steps)
        gradient = self._anchor_gradient if is_anchor else self._reward_gradient
        if plan.regression and not is_anchor:
            results = finish_in_turn(self._begin_regression(step, micro, plan) for micro in micros)
        else:
            results = [gradient(step, micro, plan) for micro in micros]
        for micro, result in enumerate(results if is_due(step + 1, self.options.anchor_data_steps) else ()):
            loss_B = self.data.loss(step, micro, self.text, self.fields)
            self._add_term(result.columns, "data_loss", self.options.anchor_data_weight, loss_B)
        grad = self.masters.vector.grad = self.accelerator.reduce(self.masters.vector.grad, "sum")
        return results, grad.norm().item()

    def _reward_gradient(self, step: int, micro: int, plan: Plan) -> BatchResult:
        """Sample, score and back-propagate one batch: the loss is -R(x_N) + weight * drift."""
        batch = self.batches.batch(self.rollouts.rollout_index(step, micro), micro)
        cond = self.text(batch.prompts, self.device)
        prefix, window = self.fields.tuned(cond), self.fields.window(cond)

        noise, start = batch.noise("train"), self.rollouts.get(step, micro)
        states = rollout(prefix, window, noise, plan.sigmas, plan.grad_steps, plan.detach_input, start)
        self.rollouts.put(step, micro, states[plan.window_start])
        drift_state = states[plan.drift_step].detach() if self.drift_weight else None

        samples = gradient_samples(window, states, batch.noise, plan)
        results = [self._sample_gradient(sample, batch.prompts, cond, step, plan.num_samples) for sample in samples]
        columns = results[0].columns | {"loss": torch.stack([result.columns["loss"] for result in results]).mean(0)}
        if self.drift_weight:
            self._add_term(columns, "drift", self.drift_weight, self._drift(cond, drift_state, plan))
        return BatchResult(columns, *first_failure(results))

    def _sample_gradient(
        self, sample: Sample, prompts: list[str], cond: Conditioning, step: int, num_samples: int
    ) -> BatchResult:
        """Score and back-propagate one of a rollout's samples: the loss is -R."""
        scores_B, scored = self.scorer.score(sample, prompts, cond, step)
        loss = reward_loss(scores_B)
        self._back_propagate(loss / num_samples)
        return self._result(scored, loss.expand(len(prompts)))

    def _result(self, scored: BatchResult, loss_B: torch.Tensor) -> BatchResult:
        """Return the scored batch with its loss; it is suspect if the gradient is not finite."""
        suspect = None if self.masters.vector.grad.sum().isfinite() else scored.suspect
        return BatchResult({"loss": loss_B.detach()} | scored.columns, suspect, scored.error)

    def _begin_regression(self, step: int, micro: int, plan: Plan) -> Callable[[], BatchResult]:
        """Sample by the old policy and begin to score; return what is left to do with the batch.

        That is to back-propagate the method's own loss. The batch after it is sampled before, while
        another process may score this one: all of them are sampled with the same weights.
        """
        batch, fields = self.batches.batch(step, micro), self.fields
        cond = self.text(batch.prompts, self.device)
        with self.masters.use(self.masters.old):
            states = plan.regression.sample(fields.tuned(cond), batch.noise, plan.sigmas)
        finish = self.scorer.begin(states[-1], batch.prompts, cond, step)

        def regress() -> BatchResult:
            scores_B, gradient, scored = finish()
            velocities = fields.window(cond), fields.old(cond), fields.base_vjp(cond)
            rollout = ScoredRollout(states, plan.sigmas, scores_B, gradient, batch.noise, *velocities)
            loss_B = torch.zeros_like(scores_B)
            for term_B in plan.regression.losses(rollout):
                self._back_propagate(term_B.mean())
                loss_B += term_B.detach()
            return self._result(scored, loss_B)

        return regress

    def _anchor_gradient(self, step: int, micro: int, plan: Plan) -> BatchResult:
        """Back-propagate KL(base || tuned), the drift at a state of the base's own rollout."""
        batch = self.batches.batch(step, micro)
        cond = self.text(batch.prompts, self.device)
        x_BCTHW = sample_euler(self.fields.base(cond), batch.noise("train"), plan.sigmas[: plan.drift_step + 1])[-1]
        return BatchResult(self._add_term({}, "drift", 1.0, self._drift(cond, x_BCTHW, plan)))

    def _drift(self, cond: Conditioning, x_BCTHW: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Return the drift (B,) at the plan's step, with gradient."""
        if self.options.negative_drift_weight:
            tuned, base = self.fields.negative(cond)
        else:
            tuned, base = self.fields.window(cond), self.fields.base(cond)
        return plan.drift_total * velocity_distance(tuned, base, x_BCTHW, plan.sigmas[plan.drift_step])

    def _add_term(self, columns: dict, name: str, weight: float, loss_B: torch.Tensor) -> dict[str, torch.Tensor]:
        """Back-propagate a weighted loss (B,); add it to the columns' loss, and log it by name."""
        self._back_propagate(weight * loss_B.mean())
        columns[name] = loss_B = loss_B.detach()
        columns["loss"] = columns.get("loss", 0) + weight * loss_B
        return columns

    def _back_propagate(self, loss: torch.Tensor) -> None:
        """Back-propagate the loss over all batches and processes; add to the masters' gradient."""
        (loss / (self.args.gradient_accumulation_steps * self.layout.num_processes)).backward()
        self.masters.collect_grad()

    def _update(self, step: int, norm: float) -> None:
        """Take an optimizer step on the gradient, whose norm is given, and write the adapter."""
        masters, args = self.masters, self.args
        clip_gradient(masters.vector.grad, norm, args.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        masters.write()
        masters.update_averages(step)

    def _video_sampler(self, field: Callable[[Conditioning], Velocity]) -> MakeVideos:
        """Return a sampler of videos by a velocity field, which a signal may interrupt."""
        sampler = VideoSampler(field, self.text, self.pipe.vae, self.sigmas, self.args.decode_chunk)

        def sample(prompts: list[str], noise_BCTHW: torch.Tensor) -> Sampled:
            with self.stop.interruptible():
                return sampler(prompts, noise_BCTHW)

        return sample

    # ------------------------------------------------------------------------------------- the run

    def train(self) -> dict:
        """Train once, with evaluations before and after; return the content of summary.json.

        Raises TrainingInterrupted after a signal, TrainingError or RewardError if training cannot
        go on. checkpoints/ then holds the last good step.
        """
        require_untrained(trained=self.state.global_step > self.resumed["step"])
        is_main = self.accelerator.is_main_process
        with lock_folder(self.folder, is_main), report_at_end(self.folder, is_main):
            summary = self._train()
        self.callbacks.notify("on_train_end")
        return summary

    def _train(self) -> dict:
        """Run training and evaluations, save the adapter; return the content of summary.json."""
        first = self.resumed["step"]
        self.started = time.perf_counter() - seconds_before(self.resumed, self.folder)  # of all parts of the run
        self._begin()
        with run_trackers(self.accelerator, self.args):
            self.callbacks.notify("on_train_begin")
            if self.monitor:
                self.monitor.begin(self.sample_base, first, self.resumed.get("guard"))
            done = self._train_steps(first)
            self._save(done)
            with self.masters.use(self.masters.average):
                if self.args.load_best_model_at_end:
                    self.monitor.load_best(done)
                if self.accelerator.is_main_process:
                    self.masters.save_adapter(self.folder / "adapter" / ADAPTER_FILE)
                if self.monitor:
                    return self.monitor.finish(done, self.started)
                if self.accelerator.is_main_process:
                    remove_results(self.folder)
        self.accelerator.print(f"Nothing was evaluated. The adapter: {self.folder / 'adapter'}")
        return {"seconds": time.perf_counter() - self.started, "steps": done}

    def _begin(self) -> None:
        """Start the run's folder, with the initial adapter; calibrate the rewards if need be."""
        args, prompts = self.args, self.calibration_prompts
        self.accelerator.wait_for_everyone()  # all have read the folder before it changes
        if self.accelerator.is_main_process:
            start_run_folder(args, self.batches.prompts, self.eval_prompts)
            if (initial := self.masters.initial).layers:
                initial.save(self.folder / INITIAL_KEY / ADAPTER_FILE)
        if prompts:
            shape, info = self.batches.noise_shape, self.scorer.info(0)
            calibrate(self.rewards, self.sample_base, prompts, shape, args, self.layout, info)

    def _train_steps(self, first: int) -> int:
        """Take the optimizer steps from `first` on; return how many the run has then taken."""
        args, log, done = self.args, RunLog(self.accelerator, self.args, first), first
        prompts = [*self.batches.prompts, *self.eval_prompts]
        with self.stop as stop, log:
            for name, choice in self.choices.items():
                log.say(f"{name}: {choice}")
            if stopped := self.monitor and self.monitor.stop:  # before this part of the run
                log.say(f"{stopped} To go on, raise early_stopping_patience.")
                return done
            for done in range(first + 1, args.max_steps + 1):
                self.callbacks.begin_step()
                metrics, stop.doing = None, f"step {done}"
                try:
                    metrics = self.step(done - 1)
                    self.callbacks.end_step(done, metrics["epoch"])
                    metrics |= self._evaluate_or_sample(done)
                except (Exception, KeyboardInterrupt) as error:
                    # Not together: other processes may have failed elsewhere.
                    saved = self._save(done if metrics else done - 1, together=False)
                    if metrics:
                        log.step(metrics)
                    if isinstance(error, KeyboardInterrupt):
                        raise TrainingInterrupted(saved) from None
                    raise
                log.step(metrics)
                self.callbacks.log(metrics)
                if done == 1 and (unread := unread_message(prompts, guided=args.guidance_scale > 1)):
                    log.say(unread)  # once a run, when all rewards were asked
                stopping = any_process(self.accelerator, stop.requested)
                if stopping or self.callbacks.is_requested("save") or is_due(done, args.save_steps):
                    saved = self._save(done)
                if stopping:
                    raise TrainingInterrupted(saved)
                if stopped := self.monitor and self.monitor.stop:
                    log.say(stopped)
                if stopped or self.callbacks.is_requested("training_stop"):
                    break
        return done

    def _evaluate_or_sample(self, done: int) -> dict[str, float]:
        """Evaluate or sample if it is due after `done` steps; return the metrics."""
        if not self.monitor:
            return {}
        args = self.args
        evaluate = self.callbacks.is_requested("evaluate") or is_due(done, args.eval_steps)
        evaluate |= args.load_best_model_at_end and done == args.max_steps  # the last step may be the best
        sample = is_due(done, args.sample_steps) and done < args.max_steps
        self.stop.doing = f"the evaluation of step {done}" if evaluate else self.stop.doing
        return self.monitor.evaluate_or_sample(done, evaluate, sample)

    # --------------------------------------------------------------------------- restore and save

    def _find_checkpoint(self) -> tuple[Path | None, dict]:
        """Return the checkpoint to resume, None for a new run, and its state; restore batches."""
        which = self.args.resume_from_checkpoint
        if not which:
            self.accelerator.print(restart_message(self.args), end="")
            return None, {"step": 0}
        path = find_checkpoint(which, self.folder, quiet=not self.accelerator.is_main_process)
        saved = read_state(path)
        self.accelerator.print(resume_message(path, saved, self.args, self.inputs))
        self.batches.restore(saved["step"], saved)
        self.data.restore(saved)
        return path, saved

    def _save(self, done: int, together: bool = True) -> Path:
        """Save a checkpoint after `done` steps; together: all processes call it and wait for it."""
        folder = self.folder / "checkpoints"
        if self.accelerator.is_main_process:
            state = {"settings": dataclasses.asdict(self.args), "inputs": self.inputs} | self.batches.state(done)
            state |= self.data.state(done) | {"seconds": time.perf_counter() - self.started}
            state |= {"guard": self.monitor.state()} if self.monitor else {}
            save_checkpoint(folder, done, self.masters, self.optimizer, state, self.args.save_total_limit)
        if together:
            self.accelerator.wait_for_everyone()
            self.callbacks.notify("on_save")
        return folder / f"step-{done}"
