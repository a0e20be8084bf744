"""Base against tuned on held-out prompts: the same prompts, the same noise, each prompt's own difference.

Shape legend: B batch, N prompts, C channels, T frames, H height, W width.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rewards import RewardMix
from rlhf.sampler import draw_noise

MOTION, DIVERSITY = "motion", "diversity"


@dataclass(frozen=True)
class Evaluation:
    """What one model did on the held-out prompts."""

    prompts: list[str]
    scores: dict[
        str, torch.Tensor
    ]  # by judge, MOTION or DIVERSITY: (N,) float32; DIVERSITY of the leading prompts only
    videos_NCTHW: torch.Tensor  # uint8, of the leading prompts; empty on all but the main process

    def means(self) -> dict[str, float]:
        return {name: scores.mean().item() for name, scores in self.scores.items() if len(scores)}

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"scores.{name}": scores for name, scores in self.scores.items()}
        save_file(
            tensors | {"videos": self.videos_NCTHW.contiguous()}, path, metadata={"prompts": json.dumps(self.prompts)}
        )

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            prompts = json.loads(file.metadata()["prompts"])
        return cls(prompts, {k[7:]: v for k, v in tensors.items() if k != "videos"}, tensors["videos"])


@torch.no_grad()
def evaluate(
    make_videos: Callable[[list[str], torch.Tensor], torch.Tensor],
    judges: dict[str, Callable],
    prompts: list[str],
    noise_shape_CTHW: tuple[int, int, int, int],
    *,
    seed: int,
    batch_size: int,
    num_videos: int,
    num_diversity: int,
    accelerator,
    progress: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Sample a video of every prompt and judge it; the processes share the prompts and all get all scores.

    make_videos: prompts and noise (B, C, T, H, W) to whole videos. The noise depends on `seed` and the prompt's place
    alone. motion: mean absolute difference of neighbouring frames, in [0, 1]. diversity: mean absolute difference of two
    videos of one prompt, of the leading num_diversity prompts. `progress` is told the videos made.
    """
    mix = RewardMix(judges, [0.0] * len(judges))  # of weight 0: scores without gradient
    share = math.ceil(len(prompts) / accelerator.num_processes)
    own = range(len(prompts))[accelerator.process_index * share :][:share]
    scores = {name: torch.zeros(len(prompts)) for name in [*judges, MOTION]}
    scores[DIVERSITY] = torch.zeros(min(num_diversity, len(prompts)))
    kept = []
    for start in range(0, len(own), batch_size):
        rows = list(own[start : start + batch_size])
        texts = [prompts[i] for i in rows]
        video = make_videos(texts, draw_noise(noise_shape_CTHW, seed, "evaluation", [(i, 0) for i in rows]))
        for name, scores_B in mix(video, texts)[1].items():
            scores[name][rows] = scores_B.cpu()
        scores[MOTION][rows] = motion(video).cpu()
        if again := [i for i in rows if i < num_diversity]:
            noise = draw_noise(noise_shape_CTHW, seed, "evaluation", [(i, 1) for i in again])
            other = make_videos([prompts[i] for i in again], noise)
            scores[DIVERSITY][again] = distance(video[: len(again)], other).cpu()
        if accelerator.is_main_process and rows[0] < num_videos:
            kept.append(to_uint8(video[: num_videos - rows[0]]))
        progress(len(rows) + len(again))
    scores = {name: accelerator.reduce(s.to(accelerator.device), "sum").cpu() for name, s in scores.items()}
    return Evaluation(prompts, scores, torch.cat(kept) if kept else torch.zeros(0, dtype=torch.uint8))


def motion(video_BCTHW: torch.Tensor) -> torch.Tensor:
    """(B,) mean absolute difference of neighbouring frames; 0 for a single frame."""
    if video_BCTHW.shape[2] == 1:
        return torch.zeros(len(video_BCTHW), device=video_BCTHW.device)
    return video_BCTHW.diff(dim=2).abs().mean((1, 2, 3, 4))


def distance(a_BCTHW: torch.Tensor, b_BCTHW: torch.Tensor) -> torch.Tensor:
    """(B,) mean absolute difference of two videos."""
    return (a_BCTHW - b_BCTHW).abs().mean((1, 2, 3, 4))


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """[0, 1] to 0 .. 255, rounded, on the CPU."""
    return (video.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def paired(base_N: torch.Tensor, tuned_N: torch.Tensor) -> dict:
    """Means, mean difference and its 95 % interval from the differences of each prompt (Student's t)."""
    difference = (tuned_N - base_N).double()
    count, diff = len(difference), difference.mean().item()
    error = difference.std().item() / math.sqrt(count) if count > 1 else 0.0
    half = student_t_975(count - 1) * error
    return {
        "base": base_N.double().mean().item(),
        "tuned": tuned_N.double().mean().item(),
        "diff": diff,
        "ci95": [diff - half, diff + half],
    }


def student_t_975(freedom: int) -> float:
    """The 97.5 % point of Student's t: exact for one and two degrees of freedom, then Cornish-Fisher's expansion."""
    if freedom < 3:
        return (0.0, 12.7062, 4.3027)[freedom]
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def summarise(base: Evaluation, tuned: Evaluation, trained: list[str], seconds: float, steps: int) -> dict:
    """The content of summary.json. `trained`: the judges that were trained on; the others are held out.

    {"seconds", "steps", "trained": {name: {"base", "tuned", "diff", "ci95": [lo, hi]}}, "held_out": {...}, "motion": {...},
    "diversity": {...}}; a held-out judge goes by its short name, without the prefix "nano_".
    """
    compared = {n: paired(base.scores[n], tuned.scores[n]) for n in base.scores if len(base.scores[n])}
    measures = {name: compared.pop(name, {}) for name in (MOTION, DIVERSITY)}
    held_out = {name.removeprefix("nano_"): row for name, row in compared.items() if name not in trained}
    return {
        "seconds": seconds,
        "steps": steps,
        "trained": {name: compared[name] for name in trained},
        "held_out": held_out,
    } | measures
