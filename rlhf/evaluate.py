"""A model on held-out prompts: always the same prompts and the same noise, so that models can be compared.

Shape legend: B batch, N prompts, C channels, T frames, H height, W width.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rewards import RewardMix
from rlhf.config import RewardGradientConfig
from rlhf.io import file_errors, write_whole
from rlhf.layout import Layout
from rlhf.measures import DIVERSITY, MEASURES, OF_ONE_VIDEO, distance
from rlhf.parallel import own_batches
from rlhf.run.video import to_uint8, write_samples
from rlhf.sampler import draw_noise
from rlhf.trackers import Clip
from rlhf.tracking import progress_bar

# Settings without which a prompt's and a noise's video is another one, or judged otherwise.
OF_A_VIDEO = (
    *("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "negative_prompt"),
    *("max_sequence_length", "reward_kwargs"),
    *("dtype", "base_bits", "vae_dtype", "guidance_every", "sampling_weights"),
)
ALIKE = (*OF_A_VIDEO, "eval_seed", "num_diversity_prompts")  # of two evaluations that compare
MakeVideos = Callable[[list[str], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Evaluation:
    """What one model did on the held-out prompts."""

    prompts: list[str]
    scores: dict[str, torch.Tensor]  # by judge or measure: (N,) float32; DIVERSITY of the leading prompts only
    videos_NCTHW: torch.Tensor  # uint8, of the leading prompts; empty on all but the main process
    settings: dict = field(default_factory=dict)  # those of ALIKE

    def means(self) -> dict[str, float]:
        """The mean over prompts of every judge and measure that has a score."""
        return {name: scores.mean().item() for name, scores in self.scores.items() if len(scores)}

    def save(self, path: Path) -> None:
        """Write it as one safetensors file, whole or not at all; prompts and settings are in its metadata."""
        tensors = {f"scores.{name}": scores for name, scores in self.scores.items()}
        told = {"prompts": json.dumps(self.prompts), "settings": json.dumps(self.settings)}
        with write_whole(path) as unfinished:
            save_file(tensors | {"videos": self.videos_NCTHW}, unfinished, metadata=told)

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Read what `save` wrote. Raises DamagedFileError."""
        with file_errors(path), safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            prompts, settings = (json.loads(file.metadata().get(key, "{}")) for key in ("prompts", "settings"))
        scores = {k[7:]: v for k, v in tensors.items() if k != "videos"}
        return cls(prompts, scores, tensors["videos"], settings)


def kept_settings(args: RewardGradientConfig, names: tuple[str, ...]) -> dict:
    """The settings of these names, as they come back from a JSON file."""
    return json.loads(json.dumps({name: vars(args).get(name) for name in names}))


class HeldOut:
    """The held-out prompts of a run, and what is done with them.

    Args:
        make_videos: prompts and noise (B, C, T, H, W) to whole videos (B, 3, T, H, W) in [0, 1], by the current model.
        judges: rewards by name, trained on or not.
        noise_shape_CTHW: of the latents of one video.
        show: (step, samples) -> None, shows samples that are written.
    """

    def __init__(
        self,
        make_videos: MakeVideos,
        judges: dict[str, Callable],
        prompts: list[str],
        noise_shape_CTHW: tuple[int, int, int, int],
        args: RewardGradientConfig,
        layout: Layout,
        fps: int,
        show: Callable[[int, list[Clip]], None] = lambda step, clips: None,
    ):
        self.make_videos, self.judges, self.prompts = make_videos, judges, prompts
        self.noise_shape, self.args, self.layout, self.fps = noise_shape_CTHW, args, layout, fps
        self.folder, self.show = Path(args.output_dir), show
        self.diversity_count = min(args.num_diversity_prompts, len(prompts))

    @torch.no_grad()
    def evaluate(self, name: str, step: int, make_videos: MakeVideos | None = None) -> Evaluation:
        """Sample a video of every prompt, judge it and write the samples; all processes share the work and the scores.

        Measures are those of `rlhf.measures`, all in [0, 1]; diversity is the distance of two videos of one prompt, for
        the leading prompts. make_videos: of another model than the current one.
        """
        make_videos = make_videos or self.make_videos
        mix = RewardMix(self.judges, [0.0] * len(self.judges))  # of weight 0: scores without gradient
        scores = {judge: torch.zeros(len(self.prompts)) for judge in [*self.judges, *OF_ONE_VIDEO]}
        scores[DIVERSITY] = torch.zeros(self.diversity_count)
        shown, videos = self.args.num_sample_prompts, [torch.zeros(0, dtype=torch.uint8)]
        size = self.args.per_device_eval_batch_size
        batches = own_batches(len(self.prompts), size, self.layout)
        info = {"fps": self.fps, "seed": self.args.eval_seed, "step": 0}
        own = [i for rows in batches for i in rows]
        count = len(own) + sum(i < self.diversity_count for i in own)
        with progress_bar(f"evaluate {name}", "video", count, self._is_main) as bar:
            for number, rows in enumerate(batches):
                video = self._videos(make_videos, rows, draw=0)
                twice = [i for i in rows if i < self.diversity_count]
                if twice or (self.layout.in_step and number * size < self.diversity_count):  # as the first process has
                    other = self._videos(make_videos, twice, draw=1)
                if not rows:
                    continue
                for judge, scores_B in mix(video, [self.prompts[i] for i in rows], **info)[1].items():
                    scores[judge][rows] = scores_B.cpu()
                for measure, of in OF_ONE_VIDEO.items():
                    scores[measure][rows] = of(video).cpu()
                if twice:
                    scores[DIVERSITY][twice] = distance(video[: len(twice)], other).cpu()
                videos.append(to_uint8(video[: max(0, shown - rows[0])]))
                bar.update(len(rows) + len(twice))
        scores = {judge: self._sum_over_processes(values) for judge, values in scores.items()}
        videos_NCTHW = self._leading(torch.cat(videos), len(self.prompts), shown)
        evaluation = Evaluation(self.prompts, scores, videos_NCTHW, self._settings)
        self._write(step, videos_NCTHW)
        return evaluation

    def base(self, resumed: bool, make_videos: MakeVideos | None = None) -> Evaluation:
        """The evaluation of the base, by make_videos; a resumed run reads that of its folder, if it was made alike."""
        path = self.folder / "evaluation" / "base.safetensors"
        if resumed and path.is_file():
            kept = Evaluation.load(path)
            alike = (kept.prompts, kept.settings) == (self.prompts, self._settings)
            if alike and {*self.judges, *MEASURES} <= set(kept.scores):
                return kept
        base = self.evaluate("base", 0, make_videos)
        if self._is_main:
            base.save(path)
        return base

    def sample(self, step: int) -> None:
        """Write sample videos of the current model, without judging them; all processes share the work."""
        count = min(self.args.num_sample_prompts, len(self.prompts))
        videos = [torch.zeros(0, dtype=torch.uint8)]
        for rows in own_batches(count, self.args.per_device_eval_batch_size, self.layout):
            videos.append(to_uint8(self._videos(self.make_videos, rows, draw=0)))
        self._write(step, self._leading(torch.cat(videos), count, count))

    def _videos(self, make_videos: MakeVideos, rows: list[int], draw: int) -> torch.Tensor:
        """Videos number `draw` of the prompts of the rows; for none, one is made to keep step with other processes."""
        asked = rows or [0]
        noise = draw_noise(self.noise_shape, self.args.eval_seed, "evaluation", [(i, draw) for i in asked])
        return make_videos([self.prompts[i] for i in asked], noise)[: len(rows)]

    def _leading(self, own_NCTHW: torch.Tensor, count: int, shown: int) -> torch.Tensor:
        """The first `shown` of `count` shared videos on the main process, none on others; own: this process's."""
        share = math.ceil(count / self.layout.num_processes)
        if shown > share:
            shape = 3, self.args.num_frames, self.args.height, self.args.width
            padded = own_NCTHW.new_zeros(share, *shape)
            padded[: len(own_NCTHW)] = own_NCTHW.reshape(-1 if len(own_NCTHW) else 0, *shape)
            own_NCTHW = self.layout.gather(padded.to(self.layout.device)).cpu()
        return own_NCTHW[: min(shown, count) if self._is_main else 0]

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return self.layout.reduce(values.to(self.layout.device), "sum").cpu()

    def _write(self, step: int, videos_NCTHW: torch.Tensor) -> None:
        if len(videos_NCTHW):  # on the main process, if any are asked for
            self.show(step, write_samples(self.folder / "samples", step, self.prompts, videos_NCTHW, self.fps))

    @property
    def _settings(self) -> dict:
        return kept_settings(self.args, ALIKE)

    @property
    def _is_main(self) -> bool:
        return self.layout.is_main_process
