"""The data of a report, read from a run's folder; a killed or failed run has less of it."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean

from rewards.contract import reward_name, split_spec
from rlhf.config import VIDEO_SIZE
from rlhf.evaluation.held_out import Evaluation
from rlhf.evaluation.paired_sets import read_pairs, read_scores
from rlhf.evaluation.statistics import paired_test
from rlhf.evaluation.video_set import SCORES, Video, pair_videos, read_set
from rlhf.io import file_errors, read_object, single_line
from rlhf.run.environment import read_environment
from rlhf.run.folder import PROMPTS, read_settings
from rlhf.run.metrics import read_metrics

GROUPS = {"trained": "trained on", "held_out": "held out"}
MEASURED = "measured"


@dataclass(frozen=True)
class Sample:
    """A prompt's videos before and after, with the scores of each judge."""

    prompt: str
    before: Path
    after: Path
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)  # by judge: before, after
    gains: dict[str, float] = field(default_factory=dict)  # by judge: how much better it is after


@dataclass(frozen=True)
class Run:
    """The folder of a run, any part of which may be absent.

    before, after: folders of `eval/generate.py`, whose videos replace the run's own samples.
    """

    folder: Path
    before: Path | None = None
    after: Path | None = None

    @cached_property
    def config(self) -> dict:
        """Return the resolved settings, {} without config.yaml."""
        return read_settings(self.folder)

    @cached_property
    def metrics(self) -> list[dict]:
        """Return the rows of metrics.jsonl."""
        return read_metrics(self.folder)

    @cached_property
    def summary(self) -> dict:
        """Return summary.json, {} of a run that did not finish, or went on since and did not."""
        path = self.folder / "summary.json"
        summary = read_object(path) if path.is_file() else {}
        with file_errors(path):
            if summary and not isinstance(summary["steps"], int):
                raise TypeError(f"steps is {summary['steps']!r}")
            for group in GROUPS:
                for row in summary[group].values() if group in summary else []:
                    tuple(map(float, (row["base"], row["tuned"], row["diff"], *row["ci95"])))
        return summary if self.is_finished else {}

    @cached_property
    def environment(self) -> list[dict]:
        """Return a row for each start of the run."""
        return read_environment(self.folder)

    @cached_property
    def evaluations(self) -> tuple[Evaluation, Evaluation] | None:
        """Return a finished run's evaluations of base and tuned model; None unless both exist."""
        paths = [self.folder / "evaluation" / f"{name}.safetensors" for name in ("base", "tuned")]
        exist = self.is_finished and all(path.is_file() for path in paths)
        return tuple(map(Evaluation.load, paths)) if exist else None

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps done."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def status(self) -> str:
        """Return in words whether the run finished, and how many steps it did."""
        planned = self.config.get("max_steps")
        done = f"{self.steps} of {planned} steps" if planned else f"{self.steps} steps"
        if not self.is_finished:
            return f"not finished: {done} were done"
        is_best = self.result_step != self.summary.get("steps")
        return f"finished: {done}" + f", the result is the adapter of step {self.result_step}" * is_best

    @property
    def result_step(self) -> int | None:
        """Return the step whose adapter the summary is about: the last, or the best if loaded."""
        best = self.config.get("load_best_model_at_end") and self.summary.get("best")
        return best["step"] if best else self.summary.get("steps")

    @property
    def exported_step(self) -> int:
        """Return the step of the run's adapter, as far as its files tell."""
        return self.steps if self.result_step is None else self.result_step

    @property
    def is_finished(self) -> bool:
        """Return whether the last start ended without an error and the adapter was written."""
        starts = self.environment
        ended = len(starts) < 2 or "seconds" in starts[-1]
        return (self.folder / "adapter").is_dir() and ended and self.ended_by is None

    @property
    def ended_by(self) -> str | None:
        """Return the error that ended the last start, None if there was none or it is unknown."""
        return self.environment[-1].get("ended_by") if self.environment else None

    @property
    def ending(self) -> str:
        """Return a sentence on how a run that did not finish ended, "" for one that did."""
        if self.ended_by:
            return f"It ended with {self.ended_by}"
        if self.environment and "seconds" not in self.environment[-1]:
            return "Its end was not recorded: it was killed, or it still runs."
        return ""

    @property
    def seconds(self) -> float | None:
        """Return the seconds of all parts of the run whose end is known, None if there is none."""
        if self.is_finished and "seconds" in self.summary:
            return self.summary["seconds"]
        parts = [row["seconds"] for row in self.environment if "seconds" in row]
        return math.fsum(parts) if parts else None

    @property
    def specs(self) -> dict[str, str]:
        """Return the spec of each reward by name, those of the training first."""
        trained = self.config.get("reward_funcs") or list(self.summary.get("trained", {}))
        return dict(map(split_spec, [*trained, *(self.config.get("eval_reward_funcs") or [])]))

    @property
    def trained_names(self) -> list[str]:
        """Return the names of the rewards that are trained on: not those of weight 0."""
        return [name for name, weight in self._weights.items() if weight]

    @property
    def not_raised(self) -> list[str]:
        """Return the names of rewards of which more is not better: with a target or lowered."""
        lowered = [name for name, weight in self._weights.items() if weight < 0]
        return [*lowered, *(self.config.get("reward_targets") or {})]

    @property
    def _weights(self) -> dict[str, float]:
        names = list(map(reward_name, self.config.get("reward_funcs") or self.summary.get("trained", {})))
        return dict(zip(names, self.config.get("reward_weights") or [1.0] * len(names), strict=False))

    @property
    def reward_names(self) -> list[str]:
        """Return the names of all rewards, those trained on first."""
        return [*self.trained_names, *(name for name in self.specs if name not in self.trained_names)]

    def result_rows(self) -> list[dict]:
        """Return the rows of the result table.

        {"name", "group", "base", "tuned", "diff", "ci95"}, and where the scores of each prompt are
        known "prompts", "win_rate", "p", "better", "equal" and "worse". "verdict" is True for a
        judge that only says right (1) or wrong (0).
        """
        folders = self.before, self.after
        if all(folder and (folder / SCORES).is_file() for folder in folders):
            return self._result_rows_of_sets()
        rows = []
        for key, group in GROUPS.items():
            rows += [self._result_row(name, group, row) for name, row in self.summary.get(key, {}).items()]
        for name, row in self.summary.items():
            if name not in GROUPS and isinstance(row, dict) and "ci95" in row:
                rows.append(self._result_row(name, MEASURED, row))
        return rows

    def _result_row(self, name: str, group: str, row: dict) -> dict:
        """Return a row of the result table, with a paired test if per-prompt scores are known."""
        more = {}
        if self.evaluations:
            base, tuned = (evaluation.scores for evaluation in self.evaluations)
            full = name if name in base else f"nano_{name}"  # summary.json drops the prefix
            if full in base:
                name, more["prompts"] = full, len(base[full])
                more["verdict"] = all(((s[full] == 0) | (s[full] == 1)).all().item() for s in (base, tuned))
                if len(base[full]) > 1:
                    test = paired_test(base[full], tuned[full])
                    more |= {key: test[key] for key in ("win_rate", "p", "better", "equal", "worse")}
        return {"name": name, "group": group} | row | more

    def _result_rows_of_sets(self) -> list[dict]:
        """Return the rows of the result table for two scored video sets."""
        pairs, rows = read_pairs(self.before, self.after), []
        for name in pairs.base:
            group = GROUPS["trained" if name in self.trained_names else "held_out"]
            test = paired_test(pairs.base[name], pairs.tuned[name])
            rows.append({"name": name, "group": group, "prompts": len(pairs.prompts)} | test)
        return rows

    def samples(self) -> list[Sample]:
        """Return the pairs of videos: of the given sets, else the run's first and last samples."""
        if self.before and self.after:
            return self._samples_of_sets()
        folders = [path.parent for path in sorted(self.folder.glob(f"samples/step-*/{PROMPTS}"))]
        if len(folders) < 2:
            return []
        first, last = read_set(folders[0]), read_set(folders[-1])
        step = int(folders[-1].name.removeprefix("step-"))
        is_result = self.summary and step == self.summary["steps"]
        return [
            self._sample(a, b, self._scores(i, a.prompt) if is_result else {})
            for i, (a, b) in enumerate(zip(first, last, strict=False))
            if a.prompt == b.prompt and a.path.is_file() and b.path.is_file()
        ]

    def _scores(self, i: int, prompt: str) -> dict[str, tuple[float, float]]:
        """Return the scores of the i-th held-out prompt, before and after, by judge and measure."""
        prompts = self.evaluations[0].prompts if self.evaluations else []
        if i >= len(prompts) or single_line(prompts[i]) != prompt:
            return {}
        base, tuned = (evaluation.scores for evaluation in self.evaluations)
        names = [name for name in base if i < len(base[name]) and name in tuned]
        return {name: (base[name][i].item(), tuned[name][i].item()) for name in names}

    @property
    def eval_size(self) -> str:
        """Return the size of the evaluated videos in words, "" if it is that of the training."""
        own = self.config.get("eval_size") or {}
        if self.before or not any(value != self.config[name] for name, value in own.items()):
            return ""
        height, width, frames = (own.get(name, self.config[name]) for name in VIDEO_SIZE)
        trained = "{height}x{width} with {num_frames} frames".format(**self.config)
        return f"{height}x{width} with {frames} frames; training used {trained}"

    @property
    def prompts_without_videos(self) -> int:
        """Return the number of held-out prompts that have scores but no sample video."""
        own = self.evaluations is not None and self.before is None
        return len(self.evaluations[0].prompts) - len(self.samples()) if own else 0

    def _samples_of_sets(self) -> list[Sample]:
        """Return the pairs of videos that both sets have, with the scores in both."""
        folders, samples = (self.before, self.after), []
        paths = [folder / SCORES for folder in folders]
        scores = [read_scores(path) if path.is_file() else {} for path in paths]
        for key, (before, after) in pair_videos(*map(read_set, folders)).items():
            if before.path.is_file() and after.path.is_file():
                left, right = (found.get(key, {}) for found in scores)
                both = {name: (left[name], right[name]) for name in left if name in right}
                samples.append(self._sample(before, after, both))
        return samples

    def _sample(self, before: Video, after: Video, scores: dict[str, tuple[float, float]]) -> Sample:
        """Return a pair of videos; a reward with a target or a lowered one gains by nearing it."""
        targets, gains = self.config.get("reward_targets") or {}, {}
        for name, (old, new) in scores.items():
            if name in targets:
                gains[name] = abs(old - targets[name]) - abs(new - targets[name])
            else:
                gains[name] = old - new if self._weights.get(name, 1.0) < 0 else new - old
        return Sample(before.prompt, before.path, after.path, scores, gains)


def training_table(metrics: list[dict]) -> list[dict]:
    """Return a row of statistics for each metric in metrics.jsonl.

    {"name", "first", "last", "recent": mean of the last ten, "lowest", "highest", "rows": number of
    steps that have it}.
    """
    is_number = lambda name, value: name != "step" and isinstance(value, int | float)
    names = dict.fromkeys(n for row in metrics for n, value in row.items() if is_number(n, value))
    rows = []
    for name in names:
        values = [row[name] for row in metrics if name in row]
        row = {"name": name, "first": values[0], "last": values[-1], "recent": fmean(values[-10:])}
        rows.append(row | {"lowest": min(values), "highest": max(values), "rows": len(values)})
    return rows


def run_cost(run: Run) -> dict:
    """Return the cost of a run, None for values that are unknown.

    {"steps_seconds", "total_seconds", "device_hours", "processes", "peak_memory_gib",
    "energy_kilojoules"}. Over several starts, seconds and energy are summed, memory is the maximum,
    and the number of processes is that of the last start.
    """
    steps = math.fsum(row.get("seconds", 0.0) for row in run.metrics)
    last = run.environment[-1] if run.environment else {}
    energies = [row.get("energy_joules") for row in run.environment]
    processes = last.get("processes", 1)
    peaks = [row["memory_gib"] for row in run.metrics if "memory_gib" in row]
    peaks += [last["peak_memory_bytes"] / 2**30] if last.get("peak_memory_bytes") else []
    return {
        "steps_seconds": steps,
        "total_seconds": run.seconds,
        "device_hours": processes * max(steps, run.seconds or 0.0) / 3600,
        "processes": processes,
        "peak_memory_gib": max(peaks, default=None),
        "energy_kilojoules": None if None in energies or not energies else sum(energies) / 1000,
    }
