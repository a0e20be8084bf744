"""One run of a study on nano: an arm trained for some steps, or the best of n samples.

A worker process makes many of them: it imports and loads the judges once.
"""

import dataclasses
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path

import torch
from baselines import DDPOTrainer, best_of
from study_arms import BEST_OF, DDPO, DEFAULT, JUDGES, ROOT, WORK, settings_of

from rewards import RewardMix
from rlhf.checks import check_config
from rlhf.config import RewardGradientConfig
from rlhf.config.parse import parse_config
from rlhf.device import generator, synchronize
from rlhf.evaluation.held_out import Evaluation
from rlhf.evaluation.measures import DIVERSITY, SINGLE_VIDEO_MEASURES, distance
from rlhf.evaluation.statistics import paired_interval
from rlhf.method.options import FlowGRPOOptions
from rlhf.method.plan import make_plan
from rlhf.method.rollout import draw_noise
from rlhf.trainer import RewardGradientTrainer
from rlhf.training.monitor import gains
from rlhf.training.rewards import open_rewards

(TRAINED, *HELD_OUT), WARM_UP = JUDGES, 3
CURVE_KEYS = {TRAINED: "trained"} | {name: name.removeprefix("nano_") for name in (*HELD_OUT, DIVERSITY)}
START = {
    "method": "draft_k",
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 16,
    "ema_decay": 0.0,
    "lora_rank": 16,
    "max_grad_norm": 0.3,
    "drift_weight": 0.0,
}
SHARED = START | {  # what arms change; no pictures, no checkpoints; guidance in one batch is the same and faster
    "report_to": "none",
    "save_steps": 0,
    "sample_steps": 0,
    "num_sample_prompts": 0,
    "overwrite_output_dir": True,
    "guidance_together": True,
    "base_dir": ROOT,  # of paths in settings
}


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What all runs of a study share."""

    device: str
    work: Path  # folder of what runs write, of no value afterwards but the base's evaluation
    eval_seed: int
    eval_prompts: int = 128
    diversity_videos: int = 2  # of each prompt, all pairs of which are compared; 0: none
    eval_batch: int = 64
    threads: int | None = None  # of a run on a CPU
    flags: tuple[str, ...] = ()  # further flags of train_rlhf.py
    curve: tuple[float, ...] = ()  # shares of the steps after which a run is judged, too

    def args(self, settings: dict, seed: int, steps: int) -> RewardGradientConfig:
        """Return the checked settings of a run."""
        words = SHARED | {"device": self.device, "eval_seed": self.eval_seed, "num_eval_prompts": self.eval_prompts}
        pairs = self.eval_prompts if self.diversity_videos == 2 else 0
        words |= {"num_diversity_prompts": pairs, "per_device_eval_batch_size": self.eval_batch}
        words |= {"seed": seed, "max_steps": steps, "output_dir": self.work / f"run-{os.getpid()}"}
        words |= ({"cpu_threads": self.threads} if self.threads else {}) | settings
        word = lambda value: json.dumps(value) if isinstance(value, dict) else value
        several = lambda value: value if isinstance(value, list) else [word(value)]
        given = [str(word) for key, value in words.items() for word in (f"--{key}", *several(value))]
        recipe = str(ROOT / "configs" / "nano.yaml")
        return check_config(parse_config(["--config", recipe, *given, *self.flags]))


def start_worker(counter, devices: list[int], threads: int) -> None:
    """Give this process its device and its share of the cores; called once in each."""
    sys.stderr = io.StringIO()  # progress bars of many runs at a time
    os.environ["CONTENTV_RLHF_CACHE"] = str(ROOT / WORK / "cache")
    torch.set_num_threads(threads)
    with counter.get_lock():
        number, counter.value = counter.value, counter.value + 1
    if devices:
        torch.accelerator.set_device_index(devices[number % len(devices)])


def guarded(task: Callable[[], list[dict]], about: dict) -> list[dict]:
    """Return the rows of a task; if it fails, one row that says why."""
    try:
        return task()
    except Exception as error:
        print(traceback.format_exc(), flush=True)
        return [about | {"error": f"{type(error).__name__}: {error}"}]


@lru_cache
@torch.enable_grad()  # for their probe, wherever they are asked for first
def judges_of(conditions: Conditions, changes: str = "{}") -> dict[str, Callable]:
    """Return the trained reward, then the judges of held-out videos. changes: settings as JSON."""
    return open_rewards(conditions.args(json.loads(changes), 0, 1))


def split(settings: dict) -> tuple[dict, FlowGRPOOptions | None]:
    """Split an arm's settings into those of the run and the options of DDPO, if it is that."""
    if settings.get("method") != DDPO:
        return settings, None
    run = {key: value for key, value in settings.items() if key not in ("method", "method_kwargs")}
    return run, FlowGRPOOptions(**settings.get("method_kwargs", {}))


def start(settings: dict, seed: int, steps: int, conditions: Conditions) -> RewardGradientTrainer:
    """Return a trainer of the arm, ready to step."""
    settings, ddpo = split(settings)
    args = conditions.args(settings, seed, steps)
    own = settings if "reward_funcs" in settings else {}  # a reward that others do not train on
    inputs = {"args": args, "opened_rewards": judges_of(conditions, json.dumps(own))}
    trainer = DDPOTrainer(ddpo, **inputs) if ddpo else RewardGradientTrainer(**inputs)
    trainer._begin()  # its run folder, without what train() evaluates and writes around the steps
    return trainer


# ----------------------------------------------------------------------------------------- how long


def seconds_per_step(settings: dict, timed: int, conditions: Conditions) -> float:
    """Mean of `timed` optimizer steps after some that warm up, with nothing else on the device."""
    trainer = start(settings, 0, timed + WARM_UP, conditions)
    for step in range(WARM_UP):
        trainer.step(step)
    return timed_mean(lambda number: trainer.step(WARM_UP + number), timed, trainer.device)


def seconds_per_sample(timed: int, conditions: Conditions) -> float:
    """Return the seconds to sample, decode and score one video of the base."""
    trainer = start_base(0, conditions)
    prompts = trainer.eval_prompts[: conditions.eval_batch]
    score = trained_score(trainer, prompts)
    one = lambda number: score(sample(trainer, 0, list(range(len(prompts))), number, chain=0))
    one(timed)
    return timed_mean(one, timed, trainer.device) / len(prompts)


def timed_mean(once: Callable[[int], object], count: int, device: torch.device) -> float:
    """Return the mean seconds of `count` calls."""
    synchronize(device)
    began = time.perf_counter()
    for number in range(count):
        once(number)
    synchronize(device)
    return (time.perf_counter() - began) / count


def not_timed() -> list[dict]:
    """Raise for an arm that could not be timed."""
    raise RuntimeError("a step could not be timed, so no number of steps takes the budget; see the log")


# --------------------------------------------------------------------------------------------- runs


def base_path(conditions: Conditions) -> Path:
    """Return the file of the base's evaluation."""
    return conditions.work / f"base-{conditions.eval_seed}.safetensors"


def evaluate_base(conditions: Conditions) -> dict[str, float]:
    """Judge the base once for all runs; its means."""
    if not base_path(conditions).exists():
        evaluate(start_base(0, conditions), "base", 0, conditions).save(base_path(conditions))
    return Evaluation.load(base_path(conditions)).means()


def start_base(seed: int, conditions: Conditions) -> RewardGradientTrainer:
    """Return a trainer whose model is the base, without the cost of an adapter."""
    trainer = start(settings_of(DEFAULT, {}), seed, 1, conditions)
    trainer.pipe.transformer.disable_adapters()
    return trainer


def train(settings: dict, seed: int, steps: int, conditions: Conditions) -> list[dict]:
    """Train an arm; return its row without arm and seed, and with its curve if there is one."""
    trainer = start(settings, seed, steps, conditions)
    began, curve = time.perf_counter(), []
    due = {max(1, round(share * steps)) for share in conditions.curve} | {steps}
    for done in range(1, steps + 1):
        last = trainer.step(done - 1)
        if done in due:
            with trainer.masters.use(trainer.masters.average):
                tuned = evaluate(trainer, "tuned", done, conditions)
            means = tuned.means()
            curve.append({"steps": done} | {short: means[name] for name, short in CURVE_KEYS.items() if name in means})
    found = {"steps": steps, "queries": steps * queries_per_step(trainer)}
    found |= {"wall_seconds": time.perf_counter() - began, "last_reward": last.get("reward")}
    spreads = gains(Evaluation.load(base_path(conditions)), tuned, {TRAINED: 1.0}, HELD_OUT)
    found |= {"curve": curve} if conditions.curve else {}
    return [found | spreads | judged(tuned.scores, conditions)]


def evaluate(trainer: RewardGradientTrainer, name: str, step: int, conditions: Conditions) -> Evaluation:
    """Judge the current model; its diversity is the mean over all pairs of a prompt's videos."""
    found = trainer.monitor.held_out.evaluate(name, step)
    if conditions.diversity_videos > 2:
        found.scores[DIVERSITY] = pair_distances(trainer, conditions.diversity_videos, conditions.eval_batch)
    return found


@torch.no_grad()
def pair_distances(trainer: RewardGradientTrainer, videos: int, batch: int) -> torch.Tensor:
    """Return the mean distance of the pairs of `videos` videos of each held-out prompt, (N,)."""
    return torch.cat([pair_distance(made) for _, made in several(trainer, videos, batch)])


def pair_distance(made: list[torch.Tensor]) -> torch.Tensor:
    """Return the mean distance of all pairs of videos of equal prompts, (B,)."""
    return torch.stack([distance(a, b) for a, b in combinations(made, 2)]).mean(0).cpu()


def several(trainer: RewardGradientTrainer, videos: int, batch: int) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
    """Yield held-out prompts and `videos` videos of them, `batch` at a time."""
    for rows in map(torch.Tensor.tolist, torch.arange(len(trainer.eval_prompts)).split(batch)):
        made = [sample(trainer, trainer.args.eval_seed, rows, number, chain=0) for number in range(videos)]
        yield [trainer.eval_prompts[i] for i in rows], made


def queries_per_step(trainer: RewardGradientTrainer) -> int:
    """Return the videos that the trained reward scores in a step, once for each gradient."""
    if isinstance(trainer, DDPOTrainer):
        return trainer.batches.size
    plan = make_plan(trainer.args, trainer.options, trainer.sigmas, generator("queries"))
    return trainer.batches.samples_per_step * plan.num_samples


def judged(scores: dict[str, torch.Tensor], conditions: Conditions) -> dict:
    """Differences to the base on the same prompts by short name; the interval is over prompts."""
    base = Evaluation.load(base_path(conditions)).scores
    pairs = {name: (base[name], scores_N[: len(base[name])].cpu()) for name, scores_N in scores.items() if name in base}
    found = {name: paired_interval(*pair) for name, pair in pairs.items() if len(pair[0])}
    unknown = [name for name, row in found.items() if not torch.tensor(row["tuned"]).isfinite()]
    if unknown:
        raise ValueError(f"the run ended with {', '.join(unknown)} not finite; lower its learning rate")
    short = lambda name: "trained" if name == TRAINED else name.removeprefix("nano_")
    return {short(name): row for name, row in found.items()}


def sample(trainer: RewardGradientTrainer, seed: int, rows: list[int], number: int, chain: int) -> torch.Tensor:
    """Videos of held-out prompts by the trainer's current model, from noise of their own."""
    places = [(i, number, chain) for i in rows]
    noise = draw_noise(trainer.batches.noise_shape, seed, "best of n", places)
    return trainer.monitor.held_out.make_videos([trainer.eval_prompts[i] for i in rows], noise).video_BCTHW


def trained_score(trainer: RewardGradientTrainer, prompts: list[str]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from a video to its trained score."""
    return lambda video: trainer.rewards(video, prompts, **trainer.scorer.info(0))[0]


@torch.no_grad()
def best_of_n(seed: int, count: int, report_at: list[int], seconds: float, conditions: Conditions) -> list[dict]:
    """Return a row for each n of report_at, and for `count`, the n of a training's time.

    seconds: of one sample. Everything is sampled in two chains, so that two videos of a prompt can
    be compared.
    """
    trainer, found = start_base(seed, conditions), {}
    prompts, size = trainer.eval_prompts, conditions.eval_batch
    report_at = sorted({*(n for n in report_at if n < count), count})
    for rows in map(torch.Tensor.tolist, torch.arange(len(prompts)).split(size)):
        score = trained_score(trainer, [prompts[i] for i in rows])
        make = [partial(sample, trainer, seed, rows, chain=chain) for chain in (0, 1)]
        chains = [best_of(count, one, score, report_at) for one in make]
        for (n, video), (_, other) in zip(*chains, strict=True):
            scores = judge(video, other, [prompts[i] for i in rows], trainer, conditions)
            found.setdefault(n, []).append(scores)
    return [
        {"arm": BEST_OF if n == count else f"best-of-{n}", "settings": {"n": n}, "steps": 0}
        | {"queries": n * len(prompts), "device_seconds": n * len(prompts) * seconds}
        | judged({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, conditions)
        for n, parts in found.items()
    ]


def judge(video: torch.Tensor, other: torch.Tensor, prompts: list[str], trainer, conditions) -> dict[str, torch.Tensor]:
    """Return (B,) by judge and measure; `other` has second videos of the same prompts."""
    judges = judges_of(conditions)
    scores = RewardMix(judges, [0.0] * len(judges))(video, prompts, **trainer.scorer.info(0))[1]
    measures = {name: of(video) for name, of in SINGLE_VIDEO_MEASURES.items()}
    return scores | measures | {DIVERSITY: distance(video, other)}
