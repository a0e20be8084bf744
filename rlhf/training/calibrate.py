"""Mean and spread of each reward on videos of the base model, measured once in a run.

Shape legend: C channels, T frames, H height, W width, N base samples, R rewards.
"""

from pathlib import Path

import torch

from rewards import RewardMix
from rlhf.config import RewardGradientConfig
from rlhf.distributed.accelerator import local_batches
from rlhf.distributed.layout import Layout
from rlhf.evaluation.held_out import SAMPLING_SETTINGS, MakeVideos, fingerprint
from rlhf.io import read_object, write_json
from rlhf.method.rollout import draw_noise
from rlhf.types import row_of

CALIBRATION = "calibration.json"  # {"scores": {name: [one a sample]}, "settings": {...}, "prompts": [row, ...]}
CALIBRATION_FINGERPRINT = (*SAMPLING_SETTINGS, "seed")


def calibrate(
    mix: RewardMix,
    make_videos: MakeVideos,
    prompts: list[str],
    noise_shape_CTHW: tuple[int, int, int, int],
    args: RewardGradientConfig,
    layout: Layout,
    info: dict,
) -> None:
    """Normalise the mix by `base_scores`; write these to the run's folder with their settings.

    Raises RewardError for a reward whose scores are all equal.
    """
    size = args.per_device_eval_batch_size
    scores = base_scores(mix, make_videos, prompts, noise_shape_CTHW, args.seed, size, layout, info)
    if layout.is_main_process:
        values = {name: scores_N.tolist() for name, scores_N in scores.items()}
        kept = {"scores": values, "settings": fingerprint(args, CALIBRATION_FINGERPRINT)}
        kept["prompts"] = [*map(row_of, prompts)]
        write_json(Path(args.output_dir) / CALIBRATION, kept, indent=None)
    mix.calibrate(scores)


def restore_calibration(mix: RewardMix, args: RewardGradientConfig, prompts: list[str]) -> bool:
    """Normalise the mix by the run folder's scores; return False if they belong to another run.

    prompts: those of `calibrate`, were it to run.

    Raises DamagedFileError.
    """
    path = Path(args.output_dir) / CALIBRATION
    kept = read_object(path) if path.is_file() else {}
    scores = {name: torch.tensor(values) for name, values in kept.get("scores", {}).items()}
    counts = {name: len(scores_N) for name, scores_N in scores.items()}
    fits = counts == dict.fromkeys(mix.rewards, args.calibrate_rewards)
    fits = fits and kept.get("prompts") == [*map(row_of, prompts)]
    if fits := fits and kept["settings"] == fingerprint(args, CALIBRATION_FINGERPRINT):
        mix.calibrate(scores)
    return fits


@torch.no_grad()
def base_scores(
    mix: RewardMix,
    make_videos: MakeVideos,
    prompts: list[str],
    noise_shape_CTHW: tuple[int, int, int, int],
    seed: int,
    batch_size: int,
    layout: Layout,
    info: dict,
) -> dict[str, torch.Tensor]:
    """Return each reward's raw scores (N,), on the CPU, of one base-model video for each prompt.

    Args:
        make_videos: the base model's sampler.
        seed: of the noise.
        batch_size: videos on one process at a time.
        layout: the processes that share the videos; all get every score.
        info: what rewards are told besides video and prompts.
    """
    scores_NR = torch.zeros(len(prompts), len(mix.rewards), device=layout.device)
    for rows in local_batches(len(prompts), batch_size, layout):
        # Without rows, a process of a sharded model still runs it as often as the others.
        batch = [prompts[i] for i in rows or [0]]
        noise = draw_noise(noise_shape_CTHW, seed, "calibration", [(i,) for i in rows or [0]])
        video, latents = make_videos(batch, noise)
        if rows:
            scores_NR[rows] = torch.stack(list(mix(video, batch, latents, **info)[1].values()), dim=1)
    return dict(zip(mix.rewards, layout.reduce(scores_NR, "sum").cpu().unbind(1), strict=True))
