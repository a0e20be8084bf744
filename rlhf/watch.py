"""A run looked at while it trains: held-out evaluations, the gains of its judges, the best adapter so far."""

import dataclasses
import shutil
import time
from pathlib import Path

import torch

from rlhf.adapter.masters import Masters
from rlhf.callbacks import Tell
from rlhf.checkpoint import load_vector, save_vector
from rlhf.compare import summarise
from rlhf.evaluate import Evaluation, HeldOut, MakeVideos
from rlhf.failures import TrainingError
from rlhf.guards import Guard, gains
from rlhf.lora import save_adapter
from rlhf.optimizer import due
from rlhf.run_folder import BEST
from rlhf.tracking import write_results

MASTERS_FILE = "masters.safetensors"
KEPT = ("best_gain", "best_step", "worse")  # of a guard, in a checkpoint


class Watch:
    """The held-out prompts of a run, its guard and its results.

    trained: the weight of each reward that is trained on. tell: hears of every evaluation. All of it sees the averaged
    adapter where there is one.
    """

    def __init__(self, held_out: HeldOut, trained: dict[str, float], pipe, masters: Masters, tell: Tell):
        self.held_out, self.trained, self.pipe, self.masters, self.tell = held_out, trained, pipe, masters, tell
        self.args, self.folder = held_out.args, held_out.folder
        self.guard = Guard.of(self.args)
        self.is_main = held_out.layout.is_main_process
        self.latest: tuple[int, Evaluation] | None = None  # of the current adapter after so many steps

    def begin(self, make_base_videos: MakeVideos, first: int, saved: dict | None) -> None:
        """Evaluate the base, or read its evaluation again for a run that goes on from step `first`, as `saved` then."""
        self.base = self.held_out.base(bool(self.args.resume_from_checkpoint), make_base_videos)
        self._metrics(self.base)
        self._require_gain()
        if self.guard and saved and saved.get("told_in", self._told_in) == self._told_in:
            self.guard = dataclasses.replace(self.guard, **{name: saved[name] for name in KEPT})
            self._bring_best()
        elif self.guard:
            with self.masters.averaged():
                if first:  # of a run that had no guard until now, or another: what it has learnt is not the base
                    self._measure_first(first)
                self._keep_best()

    def look(self, done: int, asked: bool) -> dict[str, float]:
        """After `done` steps: evaluate if it is time or asked for, else sample if it is time. What was found."""
        args = self.args
        with self.masters.averaged():
            if asked or due(done, args.eval_steps):
                evaluation = self.held_out.evaluate(f"step {done}", done)
                self.latest = done, evaluation
                found = self._gains(evaluation)
                if self.guard and self.guard.is_best(done, found):
                    self._keep_best()
                return self._metrics(evaluation, found)
            if due(done, args.sample_steps) and done < args.max_steps:
                self.held_out.sample(done)
            return {}

    def _require_gain(self) -> None:
        """Raise TrainingError if the run shall go by held-out gains and none can be told, before it stops for that."""
        if not (self.args.early_stopping_patience or self.args.load_best_model_at_end):
            return
        if "gain_held_out" not in self._gains(self.base):
            raise TrainingError(
                f"Each held-out reward scores all {len(self.base.prompts)} held-out prompts of the base alike, so that "
                "there is no spread to tell a gain in, and nothing to stop or to choose the best adapter by. Evaluate "
                "more prompts, add another of eval_reward_funcs, or leave early_stopping_patience and "
                "load_best_model_at_end out."
            )

    def _measure_first(self, first: int) -> None:
        evaluation = self.held_out.evaluate(f"step {first}", first)
        self.latest, found = (first, evaluation), self._gains(evaluation)
        self.guard.best_step, self.guard.best_gain = first, found.get("gain_held_out", 0.0)
        self._metrics(evaluation, found)

    @property
    def stop(self) -> str | None:
        """Why the run should stop now, if it should."""
        guard = self.guard
        if guard is None or not guard.stop:
            return None
        told = f"the best was step {self._told_best}, kept in {self._best}"
        return f"The held-out rewards did not rise in {guard.worse} evaluations; {told}."

    @property
    def _told_best(self) -> str:
        return f"{self.guard.best_step}, {self.guard.best_gain:+.2f} spreads above the base"

    def saved(self) -> dict | None:
        """What `begin` takes when the run goes on."""
        if self.guard is None:
            return None
        return {name: getattr(self.guard, name) for name in KEPT} | {"told_in": self._told_in}

    def load_best(self, done: int) -> None:
        """Make the best adapter so far the current one, on every process; done: steps of the one that is it now."""
        self.held_out.layout.wait_for_everyone()
        vector = torch.empty_like(self.masters.vector, requires_grad=False)
        load_vector(self._best / MASTERS_FILE, self.masters, vector)
        self.masters.set(vector)
        if done != self.guard.best_step:
            self.latest = None
        if self.is_main:
            print(f"The result is the adapter of step {self._told_best}.")

    def finish(self, done: int, started: float) -> dict:
        """Evaluate the current adapter as the run's result and write what a person looks at. The summary."""
        known = self.latest is not None and self.latest[0] == done
        tuned = self.latest[1] if known else self.held_out.evaluate("tuned", done)
        found, seconds = self._gains(tuned), time.perf_counter() - started
        self._metrics(tuned, found)
        summary = summarise(self.base, tuned, list(self.trained), seconds, done) | found
        if self.guard:
            summary["best"] = {"step": self.guard.best_step, "gain_held_out": self.guard.best_gain}
        if self.is_main:
            tuned.save(self.folder / "evaluation" / "tuned.safetensors")
            write_results(self.folder, summary, tuned.prompts, self.base.videos_NCTHW, tuned.videos_NCTHW)
        return summary

    def _metrics(self, evaluation: Evaluation, found: dict[str, float] | None = None) -> dict[str, float]:
        """An evaluation and its gains as they are logged; listeners hear of them."""
        metrics = {f"eval/{name}": value for name, value in (evaluation.means() | (found or {})).items()}
        self.tell("on_evaluate", metrics=dict(metrics))
        return metrics

    def _gains(self, evaluation) -> dict[str, float]:
        return gains(self.base, evaluation, self.trained, self._others)

    @property
    def _others(self) -> list[str]:
        """The judges that are not trained on."""
        return [name for name in self.held_out.judges if name not in self.trained]

    @property
    def _told_in(self) -> list:
        """What a held-out gain is told in: gains of other prompts, settings or judges do not compare with it."""
        return [self.base.prompts, self.base.settings, self._others]

    @property
    def _best(self) -> Path:
        return self.folder / BEST

    def _bring_best(self) -> None:
        """Copy the best adapter of the run that is gone on from, where this one has another folder."""
        which = self.args.resume_from_checkpoint
        theirs = Path(which).resolve().parent.parent / BEST
        if self.is_main and which != "latest" and theirs.is_dir() and not self._best.exists():
            shutil.copytree(theirs, self._best)

    def _keep_best(self) -> None:
        if self.is_main:
            save_adapter(self.pipe, self.masters, self._best)
            save_vector(self._best / MASTERS_FILE, self.masters, self.masters.vector)
