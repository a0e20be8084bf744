"""Pixels that reach each reward's network, against the published pipelines, in units of 1/255.

    python bench/reward_parity.py [--hpsv2 FOLDER]     # writes bench/results/reward_parity.json
    python bench/tables.py                             # writes the tables of docs/reward_parity.md

The pipelines are those of the installed transformers, torchvision and open_clip. FOLDER is a clone
of github.com/tgxs002/HPSv2, whose own transform is then compared. Both sides get the same 8-bit
pictures, noise and soft shapes with edges, of every size in `SIZES`. Networks are not run: the
comparison ends at their first convolution, so that no weights are needed. A video is twice the same
picture. Rewards of videos are also compared by their scores, see `reward_parity_scores`.
"""

import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import peft
import PIL
import torch
import torchvision
import transformers
from PIL import Image
from torchvision.models.optical_flow import Raft_Large_Weights
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, make_parser, show_row, write_rows
from reward_parity_scores import score_rows

from rewards.common.clip_models import OpenClip
from rewards.common.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from rewards.load import import_built_in
from rewards.models import video_align
from rewards.models.clip import ClipScore
from rewards.models.hps import random_open_clip
from rewards.models.hps_v3 import PIXELS

RESULT = Path(__file__).parent / "results" / "reward_parity.json"
SIZES = [(832, 480), (480, 832), (512, 512), (1280, 704), (848, 480), (960, 544), (1216, 832), (160, 288), (301, 203)]
HALF = (0.5,) * 3
REWARDS = ("aesthetic", "aesthetic_v1", "aesthetic_v2_5", "background_consistency", "clip_score", "hps_v2_1", "hps_v3")
REWARDS += ("image_reward", "mps", "pickscore", "subject_consistency", "viclip", "video_score")
REWARDS += ("motion_degree", "video_align", "vjepa2")  # of videos


class Reached(Exception):
    """The input of the network, raised at its first convolution."""


def pixels_of(network: torch.nn.Module, call: Callable, image: Image.Image) -> torch.Tensor:
    """Return the input of the network's first convolution when `call` scores the picture."""

    def stop(module, inputs):
        raise Reached(inputs[0])

    convolutions = (m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d))
    first = network.vlm.model.visual if hasattr(network, "vlm") else next(convolutions)  # which gets patches
    hook = first.register_forward_pre_hook(stop)
    try:
        call(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255)
    except Reached as reached:
        return reached.args[0]
    finally:
        hook.remove()
    raise AssertionError("no convolution was reached")


def by_torchvision(size: int, mean, std, mode=InterpolationMode.BICUBIC, crop: bool = True) -> Callable:
    """Return the chain of OpenAI's CLIP and of ImageReward, or one like it."""
    return Compose([Resize(size, mode), *[CenterCrop(size)] * crop, ToTensor(), Normalize(mean, std)])


def by_transformers(processor) -> Callable:
    """Return a processor of transformers as a function from a picture to a tensor."""
    return lambda image: torch.as_tensor(np.array(processor(image, return_tensors="pt")["pixel_values"]))


def by_hpsv2(folder: Path) -> Callable:
    """Return the transform of a clone of HPSv2, without importing the rest of it."""
    package = types.ModuleType("hpsv2_open_clip")
    package.__path__ = [str(folder / "hpsv2" / "src" / "open_clip")]
    sys.modules[package.__name__] = package
    transform = importlib.import_module("hpsv2_open_clip.transform")
    return transform.image_transform(224, is_train=False, resize_longest_max=True)


def by_raft(image: Image.Image) -> torch.Tensor:
    """Return a picture twice, its shorter side at 256 by PIL, by torchvision's preset of RAFT."""
    small = image.resize([8 * round(side * 32 / min(image.size)) for side in image.size], Image.BICUBIC)
    return torch.cat([picture[None] for picture in Raft_Large_Weights.C_T_SKHT_V2.transforms()(small, small)])


def by_video_processor(processor) -> Callable:
    """Return a video processor of transformers as a function from a picture, shown twice."""
    twice = lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).expand(2, -1, -1, -1)
    return lambda image: processor([twice(image)], return_tensors="pt")["pixel_values_videos"]


def comparisons(hpsv2: Path | None) -> Iterator[tuple]:
    """Yield reward, name, what is called with frames, a pipeline, its name and its deviation."""
    small = {name: {"dtype": "float32"} for name in ("hps_v3", "video_score")}
    with torch.device("meta"):  # no weights are needed
        made = {name: import_built_in(name).random_init(**small.get(name, {})) for name in REWARDS}
        made["clip_score, open_clip"] = ClipScore(OpenClip(random_open_clip(), None))
    area, edges = {"min_pixels": PIXELS, "max_pixels": PIXELS}, made["video_score"].scorer.edges
    square = {"size": {"height": 384, "width": 384}}
    whole = {"size": dict(zip(("shortest_edge", "longest_edge"), edges, strict=True)), "do_image_splitting": False}
    video_area = {"shortest_edge": video_align.MIN_PIXELS, "longest_edge": video_align.MAX_PIXELS}
    qwen = transformers.Qwen2VLVideoProcessor(size=video_area, cap_pixels_per_frame=False)
    slow, fast = transformers.CLIPImageProcessorPil(), transformers.CLIPImageProcessor()
    openai = by_torchvision(224, CLIP_MEAN, CLIP_STD)
    theirs = {
        "aesthetic": {"OpenAI's transform": openai},
        "aesthetic_v1": {"OpenAI's transform": openai},
        "aesthetic_v2_5": {"SiglipImageProcessorPil": by_transformers(transformers.SiglipImageProcessorPil(**square))},
        "background_consistency": {"OpenAI's transform": openai},
        "clip_score": {"CLIPImageProcessorPil": by_transformers(slow), "CLIPImageProcessor": by_transformers(fast)},
        "clip_score, open_clip": {
            "open_clip.image_transform": open_clip.image_transform(224, False, mean=CLIP_MEAN, std=CLIP_STD)
        },
        "hps_v2_1": {"hpsv2's image_transform": by_hpsv2(hpsv2)} if hpsv2 else {},
        "hps_v3": {"Qwen2VLImageProcessorPil": by_transformers(transformers.Qwen2VLImageProcessorPil(**area))},
        "image_reward": {"ImageReward's _transform": openai},
        "motion_degree": {"PIL at 256, torchvision's preset of RAFT": by_raft},
        "mps": {"CLIPImageProcessorPil": by_transformers(slow)},
        "pickscore": {"CLIPImageProcessorPil": by_transformers(slow), "CLIPImageProcessor": by_transformers(fast)},
        "subject_consistency": {
            "DINO's, by VBench": by_torchvision(224, IMAGENET_MEAN, IMAGENET_STD, InterpolationMode.BILINEAR, False)
        },
        "viclip": {"InternVideo's": by_torchvision((224, 224), IMAGENET_MEAN, IMAGENET_STD, crop=False)},
        "video_align": {"Qwen2VLVideoProcessor": by_video_processor(qwen)},
        "video_score": {"Idefics2ImageProcessorPil": by_transformers(transformers.Idefics2ImageProcessorPil(**whole))},
        "vjepa2": {"VJEPA2VideoProcessor": by_video_processor(transformers.VJEPA2VideoProcessor())},
    }
    for name, pipelines in theirs.items():
        for label, pipeline in pipelines.items():
            yield made[name], name, CALLS.get(name, score_frames), label, pipeline, DEVIATIONS.get(name, CLIP_STD)


def score_frames(reward: torch.nn.Module, frames_NCHW: torch.Tensor) -> None:
    """Begin to score; the image comes first, so that no text is needed."""
    reward.score_frames(frames_NCHW, *[None] * (len(inspect.signature(reward.score_frames).parameters) - 1))


def twice(frames_NCHW: torch.Tensor) -> torch.Tensor:
    """Return a video (N, C, 2, H, W) in which each picture is shown twice."""
    return frames_NCHW[:, :, None].expand(-1, -1, 2, -1, -1)


CALLS = {
    "background_consistency": lambda reward, x: reward.embedder.embed(x),
    "motion_degree": lambda reward, x: reward.motion(x, x),
    "video_align": lambda reward, x: reward.vlm.visual_tokens(
        reward.vlm.fit(twice(x), video_align.MIN_PIXELS, video_align.MAX_PIXELS)
    ),
    "vjepa2": lambda reward, x: reward.model.encoder.embeddings(reward.pixels(twice(x))),
    "hps_v3": lambda reward, x: reward.vlm.visual_tokens(reward.vlm.fit(x[:, :, None], PIXELS, PIXELS)),
    "subject_consistency": lambda reward, x: reward.embedder.embed(x),
    "viclip": lambda reward, x: reward._embed(x[:, :, None]),
    "video_score": lambda reward, x: reward.scorer.visual_tokens(x),
}
DEVIATIONS = dict.fromkeys(("aesthetic_v2_5", "motion_degree", "video_score"), HALF)
DEVIATIONS |= dict.fromkeys(("subject_consistency", "viclip", "vjepa2"), IMAGENET_STD)
OF_PATCHES = "hps_v3", "video_align"  # whose channels are among each patch's numbers


def pictures(width: int, height: int) -> list[Image.Image]:
    """Return noise, and soft shapes with sharp edges."""
    random = np.random.default_rng(0)
    soft = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    soft.paste((255, 255, 255), (width // 4, height // 3, width // 2, height // 2))
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)), soft]


def main() -> None:
    """Compare every reward with its pipelines on every picture and write the rows."""
    parser = make_parser(__doc__)
    parser.add_argument("--hpsv2", type=Path, help="a clone of github.com/tgxs002/HPSv2")
    rows = []
    for reward, name, call, label, pipeline, deviation in comparisons(parser.parse_args().hpsv2):
        worst, means = 0.0, []
        for size in SIZES:
            for image in pictures(*size):
                ours, theirs = pixels_of(reward, partial(call, reward), image), pipeline(image)
                deviation_3 = 255 * torch.tensor(deviation)
                scale = deviation_3.mean() if name in OF_PATCHES else deviation_3[:, None, None]
                ours = ours.transpose(1, 2) if name == "vjepa2" else ours.reshape(theirs.shape)
                difference = (ours - theirs).abs() * scale
                worst, means = max(worst, difference.max().item()), [*means, difference.mean().item()]
        rows.append({"arm": name, "pipeline": label, "mean": sum(means) / len(means), "max": worst})
        show_row(rows[-1])
    rows += score_rows()
    about = environment(torch.device("cpu")) | {
        library.__name__: library.__version__ for library in (torchvision, transformers, open_clip, PIL, peft)
    }
    write_rows(RESULT, about | {"sizes": [f"{width}x{height}" for width, height in SIZES]}, rows)


if __name__ == "__main__":
    main()
