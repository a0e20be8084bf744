"""What a run left in its folder, as far as it got: a run that was killed or failed has less of it."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from rewards.load import name_in
from rlhf.compare_sets import read_pairs, read_scores
from rlhf.environment import read_environment
from rlhf.evaluate import Evaluation
from rlhf.reading import read_object
from rlhf.resampling import compared
from rlhf.run_folder import settings_in
from rlhf.tracking import read_metrics
from rlhf.video_set import SCORES, Key, Video, numbered, read_set, unbroken

GROUPS = {"trained": "trained on", "held_out": "held out"}
MEASURED = "measured"


@dataclass(frozen=True)
class Sample:
    """A prompt's videos before and after, and what each judge said of them."""

    prompt: str
    before: Path
    after: Path
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)  # by judge: before, after

    @property
    def gains(self) -> dict[str, float]:
        """After less before, by judge."""
        return {judge: after - before for judge, (before, after) in self.scores.items()}


@dataclass(frozen=True)
class Run:
    """The folder of a run. Nothing of it has to be there.

    before, after: scored folders of `eval/generate.py` whose videos are shown instead of the run's own samples.
    """

    folder: Path
    before: Path | None = None
    after: Path | None = None

    @cached_property
    def config(self) -> dict:
        """The resolved settings, {} where there are none."""
        return settings_in(self.folder)

    @cached_property
    def metrics(self) -> list[dict]:
        """The rows of metrics.jsonl."""
        return read_metrics(self.folder)

    @cached_property
    def summary(self) -> dict:
        """summary.json, {} of a run that did not finish."""
        path = self.folder / "summary.json"
        return read_object(path) if path.is_file() else {}

    @cached_property
    def environment(self) -> list[dict]:
        """A row for each start."""
        return read_environment(self.folder)

    @cached_property
    def evaluations(self) -> tuple[Evaluation, Evaluation] | None:
        """The evaluations of the base and of the tuned model, if both are there."""
        paths = [self.folder / "evaluation" / f"{name}.safetensors" for name in ("base", "tuned")]
        return tuple(map(Evaluation.load, paths)) if all(path.is_file() for path in paths) else None

    @property
    def steps(self) -> int:
        """How many optimizer steps are done."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def status(self) -> str:
        """Whether it finished, in words."""
        planned = self.config.get("max_steps")
        done = f"{self.steps} of {planned} steps" if planned else f"{self.steps} steps"
        if not self._finished:
            return f"not finished: {done} were done"
        best = self.result_step != self.summary.get("steps")
        return f"finished: {done}" + f", the result is the adapter of step {self.result_step}" * best

    @property
    def result_step(self) -> int | None:
        """The step whose adapter the summary is about: the last, or the best where that was loaded. None without it."""
        best = self.config.get("load_best_model_at_end") and self.summary.get("best")
        return best["step"] if best else self.summary.get("steps")

    @property
    def _finished(self) -> bool:
        """Whether its last start came to its end; what an earlier one finished is still there."""
        starts = self.environment
        whole = len(starts) < 2 or "seconds" in starts[-1]
        return (self.folder / "adapter").is_dir() and whole and self.ended_by is None

    @property
    def ended_by(self) -> str | None:
        """The error that the run ended with, when it was last started; None for one that finished or left no trace."""
        return self.environment[-1].get("ended_by") if self.environment else None

    @property
    def trained(self) -> list[str]:
        """Names of the rewards that are trained on."""
        specs = self.config.get("reward_funcs") or list(self.summary.get("trained", {}))
        return [name_in(spec) for spec in specs]

    @property
    def judges(self) -> list[str]:
        """Names of all rewards, those trained on first."""
        others = [name_in(spec) for spec in self.config.get("eval_reward_funcs") or []]
        return [*self.trained, *(name for name in others if name not in self.trained)]

    def headline(self) -> list[dict]:
        """Rows of the first table: {"name", "group", "base", "tuned", "diff", "ci95", and win_rate, p where known}."""
        if self.before and self.after and (self.before / SCORES).is_file() and (self.after / SCORES).is_file():
            return self._headline_of_sets()
        rows = []
        for key, group in GROUPS.items():
            rows += [self._headline_row(name, group, row) for name, row in self.summary.get(key, {}).items()]
        measures = {k: v for k, v in self.summary.items() if k not in GROUPS and isinstance(v, dict) and "ci95" in v}
        return rows + [self._headline_row(name, MEASURED, row) for name, row in measures.items()]

    def _headline_row(self, name: str, group: str, row: dict) -> dict:
        more = {}
        if self.evaluations:
            base, tuned = (evaluation.scores for evaluation in self.evaluations)
            full = name if name in base else f"nano_{name}"  # a held-out judge of nano goes by its short name
            name = full if full in base else name  # as the pairs below have it
            if full in base:
                more["prompts"] = len(base[full])
            if more.get("prompts", 0) > 1:
                found = compared(base[full], tuned[full])
                more |= {key: found[key] for key in ("win_rate", "p", "better", "equal", "worse")}
        return {"name": name, "group": group} | row | more

    def _headline_of_sets(self) -> list[dict]:
        pairs, rows = read_pairs(self.before, self.after), []
        for name in pairs.base:
            group = GROUPS["trained"] if name in self.trained else GROUPS["held_out"]
            found = compared(pairs.base[name], pairs.tuned[name])
            rows.append({"name": name, "group": group, "prompts": len(pairs.prompts)} | found)
        return rows

    def samples(self) -> list[Sample]:
        """Pairs of videos: of the sets given, else the run's first and last samples, as far as both are there."""
        if self.before and self.after:
            return self._samples_of_sets()
        folders = sorted((self.folder / "samples").glob("step-*")) if (self.folder / "samples").is_dir() else []
        folders = [folder for folder in folders if (folder / "prompts.txt").is_file()]
        if len(folders) < 2:
            return []
        first, last = read_set(folders[0]), read_set(folders[-1])
        final = self.summary and int(folders[-1].name.removeprefix("step-")) == self.summary["steps"]
        return [
            Sample(a.prompt, a.path, b.path, self._scores(i, a.prompt) if final else {})
            for i, (a, b) in enumerate(zip(first, last, strict=False))
            if a.prompt == b.prompt and a.path.is_file() and b.path.is_file()
        ]

    def _scores(self, i: int, prompt: str) -> dict[str, tuple[float, float]]:
        """Of the i-th held-out prompt, by judge and measure."""
        judged = self.evaluations[0].prompts if self.evaluations else []
        if i >= len(judged) or unbroken(judged[i]) != prompt:
            return {}
        base, tuned = (evaluation.scores for evaluation in self.evaluations)
        names = [name for name in base if i < len(base[name]) and name in tuned]
        return {name: (base[name][i].item(), tuned[name][i].item()) for name in names}

    @property
    def prompts_without_videos(self) -> int:
        """How many held-out prompts were judged, but not kept as samples."""
        own = self.evaluations is not None and self.before is None
        return len(self.evaluations[0].prompts) - len(self.samples()) if own else 0

    def _samples_of_sets(self) -> list[Sample]:
        scores = [_set_scores(folder) for folder in (self.before, self.after)]
        first, after = (_by_key(read_set(folder)) for folder in (self.before, self.after))
        samples = []
        for key, video in first.items():
            if key in after and video.path.is_file() and after[key].path.is_file():
                left, right = (of.get(key, {}) for of in scores)
                both = {name: (left[name], right[name]) for name in left if name in right}
                samples.append(Sample(video.prompt, video.path, after[key].path, both))
        return samples


def _by_key(videos: list[Video]) -> dict[Key, Video]:
    return dict(zip(numbered((video.prompt, video.seed) for video in videos), videos, strict=True))


def _set_scores(folder: Path) -> dict[Key, dict[str, float]]:
    path = folder / SCORES
    return read_scores(path) if path.is_file() else {}


def training_table(metrics: list[dict]) -> list[dict]:
    """A row for each number of metrics.jsonl: {"name", "first", "last", "recent": mean of the last ten, "lowest",
    "highest", "rows": how many steps have it}."""
    names = dict.fromkeys(name for row in metrics for name, value in row.items() if isinstance(value, int | float))
    rows = []
    for name in names:
        if name == "step":
            continue
        values = [row[name] for row in metrics if name in row]
        recent = values[-10:]
        rows.append(
            {
                "name": name,
                "first": values[0],
                "last": values[-1],
                "recent": math.fsum(recent) / len(recent),
                "lowest": min(values),
                "highest": max(values),
                "rows": len(values),
            }
        )
    return rows


def cost(run: Run) -> dict:
    """{"steps_seconds", "total_seconds", "device_hours", "processes", "peak_memory_gib", "energy_kilojoules"}, None for
    what is not known. Of a run started several times, seconds of steps and energy are sums, memory is the highest, and
    the rest is the last's."""
    steps = math.fsum(row.get("seconds", 0.0) for row in run.metrics)
    last = run.environment[-1] if run.environment else {}
    spent = [row["energy_joules"] for row in run.environment if row.get("energy_joules") is not None]
    total = run.summary.get("seconds", last.get("seconds"))
    processes = last.get("processes", 1)
    peaks = [row["memory_gib"] for row in run.metrics if "memory_gib" in row]
    peaks += [last["peak_memory_bytes"] / 2**30] if last.get("peak_memory_bytes") else []
    return {
        "steps_seconds": steps,
        "total_seconds": total,
        "device_hours": processes * max(steps, total or 0.0) / 3600,
        "processes": processes,
        "peak_memory_gib": max(peaks, default=None),
        "energy_kilojoules": sum(spent) / 1000 if len(spent) == len(run.environment) and spent else None,
    }
