"""ViCLIP: frames, pixels and score against a straight-line computation and torchvision; gradient; what is refused."""

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reward_checks import (
    PHOTOGRAPH_SIZES,
    PROMPTS,
    assert_batch_is_singles,
    assert_bfloat16_model_float32_score,
    assert_chunks_change_nothing,
    assert_contract,
    assert_gradient,
    assert_grey_levels,
    make_video,
    photograph_and_noise,
)
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

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
    def make(**settings):
        return load_reward("viclip", checkpoint=checkpoint, **settings)

    return make


def block(x, weights, heads, mask=None):
    """One residual attention block of CLIP, (B, L, D), from its weights."""
    w = weights.__getitem__

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w(f"{name}.weight"), w(f"{name}.bias"))

    y = norm(x, "ln_1")
    projected = y @ w("attn.in_proj_weight").T + w("attn.in_proj_bias")
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in projected.chunk(3, -1))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + (0 if mask is None else mask)
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + y @ w("attn.out_proj.weight").T + w("attn.out_proj.bias")
    y = norm(x, "ln_2") @ w("mlp.c_fc.weight").T + w("mlp.c_fc.bias")
    return x + (y * torch.sigmoid(1.702 * y)) @ w("mlp.c_proj.weight").T + w("mlp.c_proj.bias")


def straight_line(state, pixels, ids):
    """Cosines of videos (B, 8, 3, 32, 32), normalised, and token ids (B, 8), as the published forward has it."""
    vision = {k.removeprefix("vision_encoder."): v for k, v in state.items() if k.startswith("vision")}
    text = {k.removeprefix("text_encoder."): v for k, v in state.items() if k.startswith("text")}

    def part(weights, i):
        start = f"transformer.resblocks.{i}."
        return {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}

    batch = len(pixels)
    x = F.conv2d(pixels.flatten(0, 1), vision["conv1.weight"][:, :, 0], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([vision["class_embedding"].expand(len(x), 1, -1), x], 1) + vision["positional_embedding"]
    first = x.unflatten(0, (batch, 8))[:, 0, :1]
    x = x[:, 1:].unflatten(0, (batch, 8)) + vision["temporal_positional_embedding"][0][None, :, None]
    x = torch.cat([first, x.flatten(1, 2)], 1)
    x = F.layer_norm(x, x.shape[-1:], vision["ln_pre.weight"], vision["ln_pre.bias"])
    for i in range(2):
        x = block(x, part(vision, i), heads=2)
    x = F.layer_norm(x[:, 0], x.shape[-1:], vision["ln_post.weight"], vision["ln_post.bias"]) @ vision["proj"]

    y = text["token_embedding.weight"][ids] + text["positional_embedding"]
    mask = torch.full((8, 8), float("-inf")).triu(1)
    for i in range(2):
        y = block(y, part(text, i), heads=1, mask=mask)
    y = F.layer_norm(y, y.shape[-1:], text["ln_final.weight"], text["ln_final.bias"])
    y = y[torch.arange(batch), ids.argmax(1)] @ text["text_projection"]
    return F.cosine_similarity(x, y)


@pytest.mark.parametrize(("preprocessing", "normalise"), [("internvideo", IMAGENET), ("vbench", CLIP)])
def test_the_score_equals_a_straight_line_computation(make, state, preprocessing, normalise):
    video = make_video(24, 32, 32)  # as large as the model takes it
    pixels = normalise(video[:, :, 1::3].transpose(1, 2))
    ids = open_clip.SimpleTokenizer(context_length=8)(PROMPTS)
    assert ids[1, -1] == 49407  # cut, and ended all the same
    got = make(preprocessing=preprocessing)(video, PROMPTS)
    torch.testing.assert_close(got, straight_line(state, pixels, ids), atol=1e-5, rtol=1e-5)
    assert got.diff().abs() > 1e-3


PUBLISHED = {  # on PIL images: InternVideo's test_transform, and VBench's clip_transform_Image
    "internvideo": Compose([Resize((32, 32), InterpolationMode.BICUBIC), ToTensor(), IMAGENET]),
    "vbench": Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32), ToTensor(), CLIP]),
}


@pytest.mark.parametrize("preprocessing", PUBLISHED)
@pytest.mark.parametrize("size", PHOTOGRAPH_SIZES)
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


def test_gradient_equals_finite_difference(make):
    assert_gradient(make(dtype="float64"), make_video(9, 41, 56))
    assert_gradient(make(dtype="float64", preprocessing="vbench"), make_video(3, 41, 56))


def test_a_batch_is_its_videos_one_by_one(make):
    assert_batch_is_singles(make(), make_video(9))


def test_chunks_change_nothing(make):
    assert_chunks_change_nothing(make, make_video(9))


def test_the_contract(make):
    assert assert_contract(make()).frames == 8


def test_a_bfloat16_model_gives_float32_scores(make):
    assert_bfloat16_model_float32_score(make, make_video(8))


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
    torch.save({"model": {"visual.conv1.weight": torch.zeros(1)}}, tmp_path / "b.pth")
    with pytest.raises(RewardError, match="vision_encoder.*of ViCLIP"):
        load_reward("viclip", checkpoint=str(tmp_path / "b.pth"))


def test_missing_weights_are_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RewardError, match=r"OpenGVLab/ViCLIP, ViClip-InternVid-10M-FLT.pth: 1.7 GB.*`checkpoint`"):
        load_reward("viclip")
