"""Evaluation on held-out prompts, always with the same noise, so that models can be compared.

Shape legend: B batch, N prompts, C channels, T frames, H height, W width.
"""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from rewards import RewardMix
from rewards.load import source_digests
from rewards.placement import without_device
from rlhf.config import RewardGradientConfig, at_eval_size
from rlhf.distributed.accelerator import local_batches
from rlhf.distributed.layout import Layout
from rlhf.evaluation.measures import DIVERSITY, MEASURES, SINGLE_VIDEO_MEASURES, distance
from rlhf.generator.files import describe_model
from rlhf.io import DamagedFileError, file_errors, save_tensors
from rlhf.method.decode import Sampled
from rlhf.method.rollout import draw_noise
from rlhf.run.metrics import progress_bar
from rlhf.run.trackers import Clip
from rlhf.run.video import to_uint8, write_samples
from rlhf.types import Prompt, row_of

# Settings that change the video of a prompt and a noise, or its scores.
SAMPLING_SETTINGS = (
    *("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "negative_prompt"),
    *("max_sequence_length", "reward_kwargs"),
    *("dtype", "base_bits", "vae_dtype"),
)
EVAL_FINGERPRINT = (*SAMPLING_SETTINGS, "eval_seed", "num_diversity_prompts")
logger = logging.getLogger(__name__)
MakeVideos = Callable[[list[str], torch.Tensor], Sampled]  # (prompts, noise_BCTHW) -> videos and latents


@dataclass(frozen=True)
class Evaluation:
    """The scores and the leading videos of one model on the held-out prompts."""

    prompts: list[str]  # with their rows, which rewards and guidance read
    scores: dict[str, torch.Tensor]  # by judge or measure: (N,); DIVERSITY of the leading prompts
    videos_NCTHW: torch.Tensor  # uint8, of the leading prompts; empty on all but the main process
    settings: dict = field(default_factory=dict)  # those of EVAL_FINGERPRINT

    def means(self) -> dict[str, float]:
        """Return the mean over prompts of every judge and measure that has a score."""
        return {name: scores.mean().item() for name, scores in self.scores.items() if len(scores)}

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all; its metadata: prompts and settings."""
        tensors = {f"scores.{name}": scores for name, scores in self.scores.items()}
        told = {"prompts": json.dumps([*map(row_of, self.prompts)]), "settings": json.dumps(self.settings)}
        save_tensors(path, tensors | {"videos": self.videos_NCTHW}, told)

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Read what `save` wrote. Raises DamagedFileError."""
        with file_errors(path), safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            rows, settings = (json.loads(file.metadata().get(key, "{}")) for key in ("prompts", "settings"))
            prompts = [row if isinstance(row, str) else Prompt(row["prompt"], row) for row in rows]
        scores = {k[7:]: v for k, v in tensors.items() if k != "videos"}
        return cls(prompts, scores, tensors["videos"], settings)


def fingerprint(args: RewardGradientConfig, names: tuple[str, ...]) -> dict:
    """Return what must be equal for two evaluations to be comparable, as JSON would return it.

    These are the settings of these names, and what identifies the files of the model and of
    rewards. The devices of rewards do not count.
    """
    sources = source_digests([*args.reward_funcs, *args.eval_reward_funcs], args.base_dir, args.reward_kwargs)
    settings = {name: vars(args).get(name) for name in names} | ({"sources": sources} if sources else {})
    given = {name: without_device(kwargs) for name, kwargs in (args.reward_kwargs or {}).items()}
    settings["model_files"] = describe_model(args.model)
    settings["reward_kwargs"] = {name: kwargs for name, kwargs in given.items() if kwargs} or None
    return json.loads(json.dumps(settings))


@dataclass(frozen=True)
class EvalOptions:
    """Options of an evaluation: sampling, judging and showing held-out videos."""

    seed: int  # of their noise
    batch_size: int  # videos on one process at a time
    num_samples: int  # leading prompts whose videos are written
    num_diversity: int  # leading prompts of which a second video is made
    video_THW: tuple[int, int, int]
    fingerprint: dict  # the settings of EVAL_FINGERPRINT

    @classmethod
    def from_settings(cls, args: RewardGradientConfig) -> "EvalOptions":
        """Return the options of a run's settings, at the size of its evaluation."""
        args = at_eval_size(args)
        return cls(
            args.eval_seed,
            args.per_device_eval_batch_size,
            args.num_sample_prompts,
            args.num_diversity_prompts,
            (args.num_frames, args.height, args.width),
            fingerprint(args, EVAL_FINGERPRINT),
        )


class HeldOut:
    """The held-out prompts of a run, on which models are evaluated and sampled.

    Args:
        make_videos: the current model's sampler.
        judges: rewards by name, trained on or not.
        noise_shape_CTHW: latents of one video.
        fps: frame rate of the videos.
        folder: the run's folder.
        show: called with (step, samples) for samples that were written.
    """

    def __init__(
        self,
        make_videos: MakeVideos,
        judges: dict[str, Callable],
        prompts: list[str],
        noise_shape_CTHW: tuple[int, int, int, int],
        fps: int,
        options: EvalOptions,
        folder: Path,
        layout: Layout,
        show: Callable[[int, list[Clip]], None] = lambda step, clips: None,
    ):
        self.make_videos, self.judges, self.prompts = make_videos, judges, prompts
        self.noise_shape, self.fps, self.options = noise_shape_CTHW, fps, options
        self.folder, self.layout, self.show = folder, layout, show
        self.diversity_count = min(options.num_diversity, len(prompts))

    @torch.no_grad()
    def evaluate(self, name: str, step: int, make_videos: MakeVideos | None = None) -> Evaluation:
        """Sample and judge a video of every prompt and write the leading ones.

        All processes share the work and the scores. All measures are in [0, 1]. Diversity is the
        distance of two videos of one prompt, for the leading prompts.

        name: for the progress bar. step: optimizer steps taken, for the samples' folder.
        make_videos: the sampler of another model than the current one.
        """
        make_videos = make_videos or self.make_videos
        mix = RewardMix(self.judges, [0.0] * len(self.judges))  # without gradient
        scores = {judge: torch.zeros(len(self.prompts)) for judge in [*self.judges, *SINGLE_VIDEO_MEASURES]}
        scores[DIVERSITY] = torch.zeros(self.diversity_count)
        shown, videos = self.options.num_samples, [torch.zeros(0, dtype=torch.uint8)]
        size = self.options.batch_size
        batches = local_batches(len(self.prompts), size, self.layout)
        info = {"fps": self.fps, "seed": self.options.seed, "step": 0}
        own, finish, judged = [i for rows in batches for i in rows], lambda: (None, {}), []

        def collect() -> None:
            """Take the scores of the batch before, which were computed while this was sampled."""
            for judge, scores_B in finish()[1].items():
                scores[judge][judged] = scores_B.cpu()

        count = len(own) + sum(i < self.diversity_count for i in own)
        with progress_bar(f"evaluate {name}", "video", count, self._is_main) as bar:
            for number, rows in enumerate(batches):
                video, latents = self._videos(make_videos, rows, draw=0)
                twice = [i for i in rows if i < self.diversity_count]
                if twice or (self.layout.in_step and number * size < self.diversity_count):  # as the first process has
                    other, _ = self._videos(make_videos, twice, draw=1)
                if not rows:
                    continue
                collect()
                finish = mix.start(video, [self.prompts[i] for i in rows], latents, **info)
                judged = rows
                for measure, of in SINGLE_VIDEO_MEASURES.items():
                    scores[measure][rows] = of(video).cpu()
                if twice:
                    scores[DIVERSITY][twice] = distance(video[: len(twice)], other).cpu()
                videos.append(to_uint8(video[: max(0, shown - rows[0])]))
                bar.update(len(rows) + len(twice))
            collect()
        scores = {judge: self._sum_over_processes(values) for judge, values in scores.items()}
        videos_NCTHW = self._gather_leading(torch.cat(videos), len(self.prompts), shown)
        evaluation = Evaluation(self.prompts, scores, videos_NCTHW, self.options.fingerprint)
        self._write(step, videos_NCTHW)
        return evaluation

    def base(self, resumed: bool, make_videos: MakeVideos | None = None) -> Evaluation:
        """Read the base's evaluation in a resumed run of equal settings, else make and save it."""
        path, kept = self.folder / "evaluation" / "base.safetensors", None
        if resumed and path.is_file():
            try:
                kept = Evaluation.load(path)
            except DamagedFileError:
                logger.warning(f"{path}: got a damaged file; evaluating the base anew")
        # Together, since times of files may differ from host to host.
        if not self._sum_over_processes(torch.tensor([1.0 - self._is_reusable(kept)])).item():
            return kept
        base = self.evaluate("base", 0, make_videos)
        if self._is_main:
            base.save(path)
        return base

    def _is_reusable(self, kept: Evaluation | None) -> bool:
        """Return whether a saved evaluation has this run's prompts, settings and judges."""
        if kept is None:
            return False
        rows = [[*map(row_of, prompts)] for prompts in (kept.prompts, self.prompts)]
        same = rows[0] == rows[1] and kept.settings == self.options.fingerprint
        return same and {*self.judges, *MEASURES} <= set(kept.scores)

    def sample(self, step: int) -> None:
        """Write sample videos of the current model; all processes share the work."""
        count = min(self.options.num_samples, len(self.prompts))
        videos = [torch.zeros(0, dtype=torch.uint8)]
        for rows in local_batches(count, self.options.batch_size, self.layout):
            videos.append(to_uint8(self._videos(self.make_videos, rows, draw=0).video_BCTHW))
        self._write(step, self._gather_leading(torch.cat(videos), count, count))

    def _videos(self, make_videos: MakeVideos, rows: list[int], draw: int) -> Sampled:
        """Return video number `draw` of each row's prompt; without rows, sample one and drop it."""
        asked = rows or [0]
        noise = draw_noise(self.noise_shape, self.options.seed, "evaluation", [(i, draw) for i in asked])
        sampled = make_videos([self.prompts[i] for i in asked], noise)
        return sampled._replace(video_BCTHW=sampled.video_BCTHW[: len(rows)])

    def _gather_leading(self, own_NCTHW: torch.Tensor, count: int, shown: int) -> torch.Tensor:
        """Return the first `shown` of all `count` videos on the main process, none on others."""
        share = math.ceil(count / self.layout.num_processes)
        if shown > share:
            shape = 3, *self.options.video_THW
            padded = own_NCTHW.new_zeros(share, *shape)
            padded[: len(own_NCTHW)] = own_NCTHW.reshape(-1 if len(own_NCTHW) else 0, *shape)
            own_NCTHW = self.layout.gather(padded.to(self.layout.device)).cpu()
        return own_NCTHW[: min(shown, count) if self._is_main else 0]

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of values over all processes, on the CPU."""
        return self.layout.reduce(values.to(self.layout.device), "sum").cpu()

    def _write(self, step: int, videos_NCTHW: torch.Tensor) -> None:
        """Write sample videos, if there are any, and show them in the trackers."""
        if len(videos_NCTHW):  # on the main process alone
            self.show(step, write_samples(self.folder / "samples", step, self.prompts, videos_NCTHW, self.fps))

    @property
    def _is_main(self) -> bool:
        """Return whether this is the main process."""
        return self.layout.is_main_process
