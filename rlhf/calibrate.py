"""Each reward's mean and spread on videos of the base model, measured once in a run and kept in its folder.

Shape legend: C channels, T frames, H height, W width, N base samples, R rewards.
"""

import json
from pathlib import Path

import torch

from rewards import RewardMix
from rlhf.config import RewardGradientConfig
from rlhf.evaluate import OF_A_VIDEO, MakeVideos, kept_settings
from rlhf.io import read_object
from rlhf.layout import Layout
from rlhf.parallel import own_batches
from rlhf.sampler import draw_noise

# {"scores": {name: [raw score of each base sample]}, "settings": those of ALIKE}
CALIBRATION = "calibration.json"
ALIKE = (*OF_A_VIDEO, "seed")


def calibrate(
    mix: RewardMix,
    make_videos: MakeVideos,
    prompts: list[str],
    noise_shape_CTHW: tuple[int, int, int, int],
    args: RewardGradientConfig,
    layout: Layout,
    info: dict,
) -> None:
    """Normalise the mix by scores of one video a prompt, by the current model, which has to be the base.

    The scores are written to the run's folder; without prompts they are read from there. Raises RewardError for a
    reward that gives all of them the same.
    """
    path = Path(args.output_dir) / CALIBRATION
    if prompts:
        scores = base_scores(mix, make_videos, prompts, noise_shape_CTHW, args, layout, info)
        if layout.is_main_process:
            told = {name: scores_N.tolist() for name, scores_N in scores.items()}
            path.write_text(json.dumps({"scores": told, "settings": kept_settings(args, ALIKE)}) + "\n")
    else:
        scores = {name: torch.tensor(values) for name, values in read_object(path)["scores"].items()}
    mix.calibrate(scores)


def is_calibrated(mix: RewardMix, args: RewardGradientConfig) -> bool:
    """Whether the run's folder holds scores of these rewards on as many videos, made alike, as the settings say."""
    path = Path(args.output_dir) / CALIBRATION
    kept = read_object(path) if path.is_file() else {}
    counts = {name: len(values) for name, values in kept.get("scores", {}).items()}
    of_these = counts == dict.fromkeys(mix.rewards, args.calibrate_rewards)
    return of_these and kept["settings"] == kept_settings(args, ALIKE)


@torch.no_grad()
def base_scores(
    mix: RewardMix,
    make_videos: MakeVideos,
    prompts: list[str],
    noise_shape_CTHW: tuple[int, int, int, int],
    args: RewardGradientConfig,
    layout: Layout,
    info: dict,
) -> dict[str, torch.Tensor]:
    """Raw scores (N,) by reward, on the CPU; all processes share the work and get all of them."""
    scores_NR = torch.zeros(len(prompts), len(mix.rewards), device=layout.device)
    for rows in own_batches(len(prompts), args.per_device_eval_batch_size, layout):
        noise = draw_noise(noise_shape_CTHW, args.seed, "calibration", [(i,) for i in rows or [0]])
        batch = [prompts[i] for i in rows or [0]]  # made with the others, even where there is nothing to do
        video = make_videos(batch, noise)
        if rows:
            scores_NR[rows] = torch.stack(list(mix(video, batch, **info)[1].values()), dim=1)
    return dict(zip(mix.rewards, layout.reduce(scores_NR, "sum").cpu().unbind(1), strict=True))
