"""The pixels that reach each network against its published PIL pipeline, at full size."""

import numpy as np
import open_clip
import pytest
import torch
from pictures import by_pil, noise, to_float
from reward_checks import PROMPTS
from tiny_clip import letter_tokenizer
from tiny_judges import bert_tokenizer, clip, image_reward_model, mps_model, open_clip_of, siglip
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor, functional
from transformers import CLIPImageProcessor, CLIPImageProcessorPil, SiglipImageProcessorPil

from rewards.common.heads import LinearLayers
from rewards.common.preprocess import CLIP_MEAN, CLIP_STD
from rewards.models.aesthetic import Aesthetic, AestheticV25
from rewards.models.clip import ClipScore
from rewards.models.hps import HpsV21
from rewards.models.image_reward import ImageReward
from rewards.models.mps import Mps
from rewards.models.pickscore import PickScore


def clip_pipeline(image):
    """As published by transformers with CLIP L/14, and the H/14 that PickScore and MPS are made from."""
    return torch.from_numpy(np.array(CLIPImageProcessorPil()(image, return_tensors="np").pixel_values))


def fast_clip_pipeline(image):
    """The same by torchvision, which transformers takes where it is installed."""
    return CLIPImageProcessor()(image, return_tensors="pt").pixel_values


def open_clip_pipeline(image):
    return open_clip.image_transform(224, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)(image)[None]


def image_reward_pipeline(image):
    steps = [Resize(224, InterpolationMode.BICUBIC), CenterCrop(224), ToTensor(), Normalize(CLIP_MEAN, CLIP_STD)]
    return Compose(steps)(image)[None]


def hps_pipeline(image):
    """To a float tensor, longer side to 224, bars, normalise: ResizeMaxSize of the reference."""
    scale = 224 / max(image.size)
    height, width = (round(side * scale) for side in (image.height, image.width))
    above, left = (224 - height) // 2, (224 - width) // 2
    small = functional.resize(functional.to_tensor(image), [height, width], InterpolationMode.BICUBIC)
    square = functional.pad(small, [left, above, 224 - width - left, 224 - height - above])
    return functional.normalize(square, CLIP_MEAN, CLIP_STD)[None]


def siglip_pipeline(image):
    """As published with google/siglip-so400m-patch14-384."""
    if image.height > image.width:  # PIL from version 13 on goes height first here; by_pil says why that is left out
        return (by_pil(image, 384, "squash") - 0.5) / 0.5
    processor = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    return torch.from_numpy(np.array(processor(image, return_tensors="np").pixel_values))


REWARDS = {  # each with a small network of the published input size; the deviation that pixels are divided by
    "clip_score": (lambda: ClipScore(clip(224)), clip_pipeline, CLIP_STD),
    "clip_score, fast": (lambda: ClipScore(clip(224)), fast_clip_pipeline, CLIP_STD),
    "clip_score, open_clip": (
        lambda: ClipScore(open_clip_of(clip(224, hidden_act="gelu"))),
        open_clip_pipeline,
        CLIP_STD,
    ),
    "pickscore": (lambda: PickScore(clip(224)), clip_pipeline, CLIP_STD),
    "hps_v2_1": (lambda: HpsV21(open_clip_of(clip(224, hidden_act="gelu"))), hps_pipeline, CLIP_STD),
    "aesthetic": (lambda: Aesthetic(LinearLayers(24), clip(224)), image_reward_pipeline, CLIP_STD),
    "aesthetic_v2_5": (lambda: AestheticV25(LinearLayers(48, True), siglip(384)), siglip_pipeline, (0.5,) * 3),
    "image_reward": (
        lambda: ImageReward(image_reward_model(224), bert_tokenizer()),
        image_reward_pipeline,
        CLIP_STD,
    ),
    "mps": (lambda: Mps(mps_model(224), letter_tokenizer()), clip_pipeline, CLIP_STD),
}


@pytest.fixture(scope="module", params=REWARDS)
def network(request):
    """pixels(image): input of the network's first convolution for that picture; and the rest."""
    make, pipeline, std = REWARDS[request.param]
    reward, seen = make(), []
    first = next(module for module in reward.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    def pixels(image):
        reward(to_float(image)[:, :, None], PROMPTS[:1])
        return seen.pop()

    return pixels, pipeline, torch.tensor(std)[:, None, None]


# Width and height; from the fifth on, rounding and flooring crop one pixel apart.
SIZES = [(832, 480), (480, 832), (512, 512), (120, 160)]
SIZES += [(1280, 704), (848, 480), (480, 848), (960, 544), (1216, 832), (480, 272), (160, 288), (203, 301)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_matches_the_published_pipeline(network, size):
    pixels, pipeline, std = network
    image = noise(*size)
    ours, theirs = pixels(image), pipeline(image)
    assert ours.shape == theirs.shape
    difference = ((ours - theirs) * std * 255).abs()  # before normalisation
    assert difference.mean() < 0.5
    assert difference.max() <= 5
