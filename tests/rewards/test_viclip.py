"""ViCLIP: frames, pixels and score against a straight-line computation and torchvision."""

from functools import partial
from itertools import product

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reward_checks import (
    PHOTOGRAPH_SIZES,
    PROMPTS,
    assert_grey_levels,
    every_video_check,
    make_video,
    photograph_and_noise,
)
from straight_line_vit import layer, norm, part
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, PILToTensor, Resize, ToTensor

from rewards import RewardError, load_reward
from rewards.models.viclip import ViClipModel, middle_frames

SIZES = {
    "vision": {"patch": 8, "resolution": 32, "frames": 8, "width": 128, "layers": 2, "output": 24},
    "text": {"context_length": 8, "vocab_size": 49408, "width": 64, "layers": 2, "output_dim": 24},
}
IMAGENET = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@pytest.fixture(scope="module")
def state():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shapes = {key: tensor.shape for key, tensor in ViClipModel(SIZES).state_dict().items()}
        return {k: torch.randn(shape) * (0.15 if len(shape) > 1 else 0.5) for k, shape in shapes.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("viclip") / "ViClip.pth"
    torch.save({"model": state | {"temp": torch.tensor(0.01)}}, path)
    return str(path)


@pytest.fixture(scope="module")
def make(checkpoint):
    return partial(load_reward, "viclip", checkpoint=checkpoint)


NAMES = {"norm1": "ln_1", "norm2": "ln_2", "out": "attn.out_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
NAMES |= {letter: letter for letter in "qkv"}


def blocks(x, weights, heads, keep=None):
    """The two residual attention blocks of a tower, (B, L, D), with QuickGELU."""
    for i in range(2):
        w = part(weights, f"transformer.resblocks.{i}.")
        matrices, biases = w["attn.in_proj_weight"].chunk(3), w["attn.in_proj_bias"].chunk(3)
        for letter, matrix, bias in zip("qkv", matrices, biases, strict=True):
            w |= {f"{letter}.weight": matrix, f"{letter}.bias": bias}
        x = layer(w, x, heads, NAMES, 1e-5, keep, lambda y: y * torch.sigmoid(1.702 * y))
    return x


def straight_line(state, pixels, ids):
    """Cosines of normalised videos (B, 8, 3, 32, 32) and token ids (B, 8), as published."""
    vision, text = part(state, "vision_encoder."), part(state, "text_encoder.")
    batch = len(pixels)
    x = F.conv2d(pixels.flatten(0, 1), vision["conv1.weight"][:, :, 0], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([vision["class_embedding"].expand(len(x), 1, -1), x], 1) + vision["positional_embedding"]
    first = x.unflatten(0, (batch, 8))[:, 0, :1]
    x = x[:, 1:].unflatten(0, (batch, 8)) + vision["temporal_positional_embedding"][0][None, :, None]
    x = torch.cat([first, x.flatten(1, 2)], 1)
    x = blocks(norm(vision, "ln_pre", x, 1e-5), vision, heads=2)
    x = norm(vision, "ln_post", x[:, 0], 1e-5) @ vision["proj"]

    y = text["token_embedding.weight"][ids] + text["positional_embedding"]
    y = norm(text, "ln_final", blocks(y, text, heads=1, keep=torch.ones(8, 8).tril().bool()), 1e-5)
    y = y[torch.arange(batch), ids.argmax(1)] @ text["text_projection"]
    return F.cosine_similarity(x, y)


@pytest.mark.parametrize(("preprocessing", "normalise"), [("internvideo", IMAGENET), ("vbench", CLIP)])
def test_the_score_equals_a_straight_line_computation(make, state, preprocessing, normalise):
    video = make_video(24, 32, 32)  # as large as the model takes it
    pixels = normalise(video[:, :, 1::3].transpose(1, 2))
    prompts = [PROMPTS[0], "two dogs run along a beach at sunset"]
    ids = open_clip.SimpleTokenizer(context_length=8)(prompts)
    assert ids[1, -1] == 49407  # cut, and ended all the same
    got = make(preprocessing=preprocessing)(video, prompts)
    torch.testing.assert_close(got, straight_line(state, pixels, ids), atol=1e-5, rtol=1e-5)
    assert got.diff().abs() > 1e-3


PLAIN = Resize(32, InterpolationMode.BICUBIC, antialias=False)
PUBLISHED = {  # on PIL images: InternVideo's test_transform, and VBench's two
    "internvideo": Compose([Resize((32, 32), InterpolationMode.BICUBIC), ToTensor(), IMAGENET]),
    "vbench": Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32), ToTensor(), CLIP]),
    "vbench_mp4": Compose([PILToTensor(), PLAIN, CenterCrop(32), lambda x: x / 255, CLIP]),
}


@pytest.mark.parametrize(
    ("preprocessing", "size"),
    [*product(["internvideo", "vbench"], PHOTOGRAPH_SIZES), ("vbench_mp4", PHOTOGRAPH_SIZES[0])],
)
def test_pixels_equal_the_published_pipelines(make, preprocessing, size):
    reward, seen = make(preprocessing=preprocessing), []
    reward.model.vision_encoder.forward = lambda video: seen.append(video) or 1 / 0
    for image in photograph_and_noise(*size):
        with pytest.raises(ZeroDivisionError):
            reward(image[None, :, None] / 255, PROMPTS[:1])
        theirs = PUBLISHED[preprocessing](Image.fromarray(image.permute(1, 2, 0).numpy()))
        std = torch.tensor(PUBLISHED[preprocessing].transforms[-1].std)[:, None, None]
        assert seen[-1].shape == (1, 3, 8, 32, 32)
        assert_grey_levels((seen[-1][0, :, 3] - theirs) * std * 255)


def test_frames_are_the_published_ones():
    """get_frame_indices(8, total, sample="middle"), written from its description."""
    for total in range(1, 300):
        edges = np.linspace(0, total, min(8, total) + 1).astype(int)
        middles = [int(a + b - 1) // 2 for a, b in zip(edges[:-1], edges[1:], strict=True)]
        assert middle_frames(8, total) == middles + [middles[-1]] * (8 - len(middles))
    assert middle_frames(8, 125) == [7, 22, 38, 53, 69, 85, 100, 116]


@every_video_check
@pytest.mark.parametrize("preprocessing", ["internvideo", "vbench"])
def test_as_any_video_reward(check, make, preprocessing):
    check(lambda **settings: make(preprocessing=preprocessing, **settings), make_video(9, 41, 56))


def test_text_is_embedded_once_per_prompt(make):
    reward, asked = make(), []
    forward = reward.model.text_encoder.forward
    reward.model.text_encoder.forward = lambda ids: asked.append(len(ids)) or forward(ids)
    video = make_video(8)
    first = reward(video, PROMPTS)
    assert torch.equal(reward(video, PROMPTS), first)
    assert asked == [2]


def test_another_preprocessing_is_refused(make):
    with pytest.raises(RewardError, match="preprocessing='clip'.*internvideo, vbench"):
        make(preprocessing="clip")


def test_a_checkpoint_of_another_layout_is_refused(tmp_path, state):
    torch.save({"model": {k: v for k, v in state.items() if "ln_post" not in k}}, tmp_path / "a.pth")
    with pytest.raises(RewardError, match=r"ln_post\.bias is missing"):
        load_reward("viclip", checkpoint=str(tmp_path / "a.pth"))
