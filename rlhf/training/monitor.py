"""Held-out evaluation during training: gains, reward hacking, early stopping, best adapter."""

import dataclasses
import shutil
import time

import torch

from rewards.mix import has_spread
from rlhf.adapter.lora_weights import ADAPTER_FILE
from rlhf.adapter.masters import MasterWeights
from rlhf.config import RewardGradientConfig
from rlhf.evaluation.held_out import Evaluation, HeldOut, MakeVideos
from rlhf.evaluation.statistics import summarize
from rlhf.io import file_fingerprint, run_of_checkpoint
from rlhf.report.summary import write_results
from rlhf.run.checkpoint import GUARD_STATE, load_vector, save_vector
from rlhf.run.folder import BEST
from rlhf.training.callbacks import Notify
from rlhf.training.failures import TrainingError

MASTERS_FILE = "masters.safetensors"


def gain(name: str, base: Evaluation, tuned: Evaluation, target: float | None = None) -> float | None:
    """Return how far a judge's mean rose, in standard deviations of the base's scores over prompts.

    With a target, how much nearer to it the scores came. None if the base's scores differ by no
    more than the rounding of float32.
    """
    before, after = base.scores[name].double(), tuned.scores[name].double()
    if not has_spread(before):
        return None
    spread = before.std()
    if target is not None:
        before, after = -(before - target).abs(), -(after - target).abs()
    return ((after.mean() - before.mean()) / spread).item()


def gains(
    base: Evaluation,
    tuned: Evaluation,
    trained: dict[str, float],
    held_out: list[str],
    targets: dict[str, float] | None = None,
) -> dict[str, float]:
    """Return gain_trained, gain_held_out and their difference hacking_gap, as far as defined.

    Args:
        trained: the weight of each reward that is trained on, for their weighted mean.
        held_out: the other judges, for their mean.
        targets: of trained rewards that have one, in units of the raw score.
    """
    targets = targets or {}
    pairs = [(weight, gain(name, base, tuned, targets.get(name))) for name, weight in trained.items() if weight]
    pairs = [(weight, value) for weight, value in pairs if value is not None]
    others = [value for name in held_out if (value := gain(name, base, tuned)) is not None]
    found = {}
    if pairs:
        found["gain_trained"] = sum(w * value for w, value in pairs) / sum(abs(w) for w, _ in pairs)
    if others:
        found["gain_held_out"] = sum(others) / len(others)
    if len(found) == 2:
        found["hacking_gap"] = found["gain_trained"] - found["gain_held_out"]
    return found


@dataclasses.dataclass
class Guard:
    """Early stopping by the held-out gain; the base, with gain 0, counts as evaluated first."""

    patience: int  # evaluations without a better gain after which the run stops; 0: never
    needs_gain: bool = False  # whether the run stops, or chooses its result, by the gain
    best_gain: float = 0.0
    best_step: int = 0
    worse: int = 0  # evaluations since the best

    @classmethod
    def from_settings(cls, args: RewardGradientConfig) -> "Guard | None":
        """Return a run's guard; None without held-out rewards or evaluations during training."""
        if not (args.eval_steps and args.eval_reward_funcs):
            return None
        patience = args.early_stopping_patience
        return cls(patience, bool(patience or args.load_best_model_at_end))

    def update(self, step: int, found: dict[str, float]) -> bool:
        """Take in the gains after a step; return whether the held-out gain is the best so far."""
        better = found.get("gain_held_out", 0.0) > self.best_gain
        if better:
            self.best_gain, self.best_step = found["gain_held_out"], step
        self.worse = 0 if better else self.worse + 1
        return better

    @property
    def stop(self) -> bool:
        """Return whether `patience` > 0 evaluations in a row brought no new best held-out gain."""
        return self.patience > 0 and self.worse >= self.patience


class HeldOutMonitor:
    """A run's held-out evaluations, guard and results, of the averaged adapter if there is one.

    Args:
        trained: the weight of each reward that is trained on. targets: as in `gains`.
        notify: receives every evaluation as the event on_evaluate.
        guard: None for a run without one.
        resume_from: the setting resume_from_checkpoint.
    """

    def __init__(
        self,
        held_out: HeldOut,
        trained: dict[str, float],
        masters: MasterWeights,
        notify: Notify,
        guard: Guard | None = None,
        resume_from: str | None = None,
        targets: dict[str, float] | None = None,
    ):
        self.held_out, self.trained, self.masters, self.notify = held_out, trained, masters, notify
        self.guard, self.resume_from, self.folder, self.targets = guard, resume_from, held_out.folder, targets
        self.best_folder, self.is_main = self.folder / BEST, held_out.layout.is_main_process
        self.held_out_judges = [name for name in held_out.judges if name not in trained]
        self.latest: tuple[int, Evaluation] | None = None  # steps taken, and the evaluation then

    def begin(self, make_base_videos: MakeVideos, first: int, saved: dict | None) -> None:
        """Evaluate the base, or read its evaluation in a run resumed at step `first`."""
        self.base = self.held_out.base(bool(self.resume_from), make_base_videos)
        self._log(self.base)
        if self.guard is None:
            return
        self._require_gain()
        if saved and saved.get("told_in", self._gain_key) == self._gain_key:
            self._copy_best()
            if self._holds_best(saved):
                self.guard = dataclasses.replace(self.guard, **{name: saved[name] for name in GUARD_STATE})
                return
        with self.masters.use(self.masters.average):
            if first:  # resumed without a comparable guard: the adapter so far is not the base
                evaluation, found = self._evaluate(f"step {first}", first)
                self.guard.best_step, self.guard.best_gain = first, found.get("gain_held_out", 0.0)
                self._log(evaluation, found)
            self._save_best()

    def evaluate_or_sample(self, done: int, evaluate: bool, sample: bool) -> dict[str, float]:
        """Evaluate after `done` steps and return the metrics, else write samples, if due."""
        with self.masters.use(self.masters.average):
            if evaluate:
                evaluation, found = self._evaluate(f"step {done}", done)
                if self.guard and self.guard.update(done, found):
                    self._save_best()
                return self._log(evaluation, found)
            if sample:
                self.held_out.sample(done)
            return {}

    @property
    def stop(self) -> str | None:
        """Return the reason why the run should stop now, or None."""
        guard = self.guard
        if guard is None or not guard.stop:
            return None
        best = f"the best was step {self._best_summary}, kept in {self.best_folder}"
        return f"The held-out rewards did not rise in {guard.worse} evaluations; {best}."

    def state(self) -> dict | None:
        """Return the guard's state for `begin` of a resumed run."""
        if self.guard is None:
            return None
        kept = {"told_in": self._gain_key, "best": self._best_digest()}
        return {name: getattr(self.guard, name) for name in GUARD_STATE} | kept

    def load_best(self, done: int) -> None:
        """Make the best adapter the current one on all processes, after `done` steps."""
        self.held_out.layout.wait_for_everyone()
        vector = torch.empty_like(self.masters.vector, requires_grad=False)
        load_vector(self.best_folder / MASTERS_FILE, self.masters, vector)
        self.masters.set(vector)
        if done != self.guard.best_step:
            self.latest = None
        if self.is_main:
            print(f"The result is the adapter of step {self._best_summary}.")

    def finish(self, done: int, started: float) -> dict:
        """Evaluate the current adapter as the result, write the results and return the summary."""
        known = self.latest is not None and self.latest[0] == done
        tuned = self.latest[1] if known else self.held_out.evaluate("tuned", done)
        found, seconds = self._gains(tuned), time.perf_counter() - started
        self._log(tuned, found)
        summary = summarize(self.base, tuned, list(self.trained), seconds, done) | found
        if self.guard:
            summary["best"] = {"step": self.guard.best_step, "gain_held_out": self.guard.best_gain}
        if self.is_main:
            tuned.save(self.folder / "evaluation" / "tuned.safetensors")
            write_results(self.folder, summary, tuned.prompts, self.base.videos_NCTHW, tuned.videos_NCTHW)
        return summary

    def _evaluate(self, name: str, done: int) -> tuple[Evaluation, dict[str, float]]:
        """Evaluate the current model, keep that as the latest; return it and its gains."""
        evaluation = self.held_out.evaluate(name, done)
        self.latest = done, evaluation
        return evaluation, self._gains(evaluation)

    def _require_gain(self) -> None:
        """Raise TrainingError if the run depends on held-out gains and none can be computed."""
        if self.guard.needs_gain and "gain_held_out" not in self._gains(self.base):
            raise TrainingError(
                f"Each held-out reward scores all {len(self.base.prompts)} held-out prompts of the base alike, so that "
                "there is no spread to tell a gain in, and nothing to stop or to choose the best adapter by. Evaluate "
                "more prompts, add another of eval_reward_funcs, or leave early_stopping_patience and "
                "load_best_model_at_end out."
            )

    def _log(self, evaluation: Evaluation, found: dict[str, float] | None = None) -> dict[str, float]:
        """Return the metrics of an evaluation and its gains; callbacks receive them too."""
        metrics = {f"eval/{name}": value for name, value in (evaluation.means() | (found or {})).items()}
        self.notify("on_evaluate", metrics=dict(metrics))
        return metrics

    def _gains(self, evaluation: Evaluation) -> dict[str, float]:
        """Return the gains of an evaluation over the base."""
        return gains(self.base, evaluation, self.trained, self.held_out_judges, self.targets)

    @property
    def _gain_key(self) -> list:
        """Return prompts, settings and judges, which must be equal for gains to be comparable."""
        return [self.base.prompts, self.base.settings, self.held_out_judges]

    @property
    def _best_summary(self) -> str:
        """Return the best step and its gain as text."""
        return f"{self.guard.best_step}, {self.guard.best_gain:+.2f} standard deviations above the base"

    def _copy_best(self) -> None:
        """Copy the best adapter from the resumed run's folder, if it is another folder."""
        theirs = run_of_checkpoint(self.resume_from) / BEST
        if self.is_main and self.resume_from != "latest" and theirs.is_dir() and not self.best_folder.exists():
            shutil.copytree(theirs, self.best_folder)

    def _holds_best(self, saved: dict) -> bool:
        """Return whether the best adapter is that of a checkpoint's guard, by the main process.

        It is another if the run went on after the checkpoint and found a better one.
        """
        digest = self._best_digest() if self.is_main else None
        other = digest not in (None, saved.get("best", digest))
        if other:
            got, expected = "got another adapter, as of a later step", f"expected that of step {saved['best_step']}"
            print(f"{self.best_folder}: {got}, {expected}; the adapter to go on from counts as the best so far")
        layout = self.held_out.layout
        return not layout.reduce(torch.tensor(float(other), device=layout.device), "sum").item()

    def _best_digest(self) -> str | None:
        """Return the SHA-256 of the best adapter's masters, None without them."""
        path = self.best_folder / MASTERS_FILE
        return file_fingerprint(path)["sha256"] if path.is_file() else None

    def _save_best(self) -> None:
        """Save the current adapter and its masters as the best, on the main process."""
        if self.is_main:
            save_vector(self.best_folder / MASTERS_FILE, self.masters, self.masters.vector)  # first: it is checked
            self.masters.save_adapter(self.best_folder / ADAPTER_FILE)
