"""A model on held-out prompts: always the same prompts and the same noise, so that models can be compared.

Shape legend: B batch, N prompts, C channels, T frames, H height, W width.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rewards import RewardMix
from rlhf.config import RewardGradientConfig
from rlhf.measures import DIVERSITY, MEASURES, OF_ONE_VIDEO, distance
from rlhf.parallel import own_share
from rlhf.sampler import draw_noise
from rlhf.tracking import EvaluationBar, write_samples

MakeVideos = Callable[[list[str], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Evaluation:
    """What one model did on the held-out prompts."""

    prompts: list[str]
    scores: dict[str, torch.Tensor]  # by judge or measure: (N,) float32; DIVERSITY of the leading prompts only
    videos_NCTHW: torch.Tensor  # uint8, of the leading prompts; empty on all but the main process

    def means(self) -> dict[str, float]:
        """The mean over prompts of every judge and measure that has a score."""
        return {name: scores.mean().item() for name, scores in self.scores.items() if len(scores)}

    def save(self, path: Path) -> None:
        """Write it as one safetensors file; the prompts are in its metadata."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"scores.{name}": scores for name, scores in self.scores.items()}
        save_file(tensors | {"videos": self.videos_NCTHW}, path, metadata={"prompts": json.dumps(self.prompts)})

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Read what `save` wrote."""
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            prompts = json.loads(file.metadata()["prompts"])
        return cls(prompts, {k[7:]: v for k, v in tensors.items() if k != "videos"}, tensors["videos"])


class HeldOut:
    """The held-out prompts of a run, and what is done with them.

    Args:
        make_videos: prompts and noise (B, C, T, H, W) to whole videos (B, 3, T, H, W) in [0, 1], by the current model.
        judges: rewards by name, trained on or not.
        noise_shape_CTHW: of the latents of one video.
    """

    def __init__(
        self,
        make_videos: MakeVideos,
        judges: dict[str, Callable],
        prompts: list[str],
        noise_shape_CTHW: tuple[int, int, int, int],
        args: RewardGradientConfig,
        accelerator,
        fps: int,
    ):
        self.make_videos, self.judges, self.prompts = make_videos, judges, prompts
        self.noise_shape, self.args, self.accelerator, self.fps = noise_shape_CTHW, args, accelerator, fps
        self.folder = Path(args.output_dir)
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
        own, size = self._own_rows(), self.args.per_device_eval_batch_size
        info = {"fps": self.fps, "seed": self.args.eval_seed, "step": 0}
        count = len(own) + sum(i < self.diversity_count for i in own)
        with EvaluationBar(name, count, self._is_main) as progress:
            for rows in (own[i : i + size] for i in range(0, len(own), size)):
                video = make_videos(*self._inputs(rows, draw=0))
                for judge, scores_B in mix(video, [self.prompts[i] for i in rows], **info)[1].items():
                    scores[judge][rows] = scores_B.cpu()
                for measure, of in OF_ONE_VIDEO.items():
                    scores[measure][rows] = of(video).cpu()
                if twice := [i for i in rows if i < self.diversity_count]:
                    other = make_videos(*self._inputs(twice, draw=1))
                    scores[DIVERSITY][twice] = distance(video[: len(twice)], other).cpu()
                videos.append(to_uint8(video[: max(0, shown - rows[0])]))
                progress(len(rows) + len(twice))
        scores = {judge: self._sum_over_processes(values) for judge, values in scores.items()}
        evaluation = Evaluation(self.prompts, scores, torch.cat(videos)[: shown if self._is_main else 0])
        self._write(step, evaluation.videos_NCTHW)
        return evaluation

    def base(self, resumed: bool, make_videos: MakeVideos | None = None) -> Evaluation:
        """The evaluation of the base, whose videos make_videos makes; a resumed run reads that of its folder."""
        path = self.folder / "evaluation" / "base.safetensors"
        if resumed and path.is_file():
            kept = Evaluation.load(path)
            if kept.prompts == self.prompts and {*self.judges, *MEASURES} <= set(kept.scores):
                return kept
        base = self.evaluate("base", 0, make_videos)
        if self._is_main:
            base.save(path)
        return base

    def sample(self, step: int) -> None:
        """Write sample videos of the current model, without judging them."""
        if self._is_main and self.args.num_sample_prompts:
            rows = list(range(len(self.prompts)))[: self.args.num_sample_prompts]
            self._write(step, to_uint8(self.make_videos(*self._inputs(rows, draw=0))))

    def _inputs(self, rows: list[int], draw: int) -> tuple[list[str], torch.Tensor]:
        """The prompts of the rows, and the noise of their videos number `draw`."""
        noise = draw_noise(self.noise_shape, self.args.eval_seed, "evaluation", [(i, draw) for i in rows])
        return [self.prompts[i] for i in rows], noise

    def _own_rows(self) -> list[int]:
        return own_share(len(self.prompts), self.accelerator)

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").cpu()

    def _write(self, step: int, videos_NCTHW: torch.Tensor) -> None:
        if self._is_main:
            write_samples(self.folder / "samples", step, self.prompts, videos_NCTHW, self.fps)

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """[0, 1] to 0 .. 255, rounded, on the CPU."""
    return (video.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().contiguous()
