"""V-JEPA 2: pixels against transformers' processor, the score against a straight line; frames."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reward_checks import (
    PHOTOGRAPH_SIZES,
    PROMPTS,
    assert_grey_levels,
    every_video_check,
    make_video,
    photograph_and_noise,
)
from safetensors.torch import load_file
from straight_line_vit import affine, norm, part
from transformers import VJEPA2Config, VJEPA2Model, VJEPA2VideoProcessor

from rewards import RewardError, load_reward
from rewards.models.vjepa2 import clip_frames

CROP, PATCH, HEADS, LAYERS = 32, 8, 2, 2
GRID = CROP // PATCH


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model in the layout of the published repository."""
    config = VJEPA2Config(
        crop_size=CROP,
        patch_size=PATCH,
        frames_per_clip=8,
        hidden_size=40,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        pred_hidden_size=24,
        pred_num_attention_heads=HEADS,
        pred_num_hidden_layers=LAYERS,
        pred_num_mask_tokens=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VJEPA2Model(config)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.2 + (parameter.ndim == 1) * 0.5
    folder = tmp_path_factory.mktemp("vjepa2")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make(folder):
    return partial(load_reward, "vjepa2", model=str(folder))


# ---------------------------------------- the reference, written from its description


def rotate(x, positions):
    """(B, heads, L, d) turned in pairs by positions (L,); both halves share the angles."""
    omega = 1 / 10000 ** (torch.arange(x.shape[-1] // 2) / (x.shape[-1] / 2))
    angles = (positions[:, None] * omega).repeat(1, 2)
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * angles.cos() + turned * angles.sin()


def rope(x, ids):
    third = 2 * ((x.shape[-1] // 3) // 2)
    places = [ids // GRID**2, ids % GRID**2 // GRID, ids % GRID]
    turned = [rotate(piece, place) for piece, place in zip(x.split(third, -1), places, strict=False)]
    return torch.cat([*turned, x[..., 3 * third :]], -1)


def transformer(x, weights, prefix, ids):
    """The blocks of encoder or predictor over tokens (B, L, D) at the places `ids` (L,)."""
    for i in range(LAYERS):
        w = part(weights, f"{prefix}.{i}.")
        y = norm(w, "norm1", x, 1e-6)
        q, k, v = (
            affine(w, f"attention.{n}", y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in ("query", "key", "value")
        )
        q, k = rope(q, ids), rope(k, ids)
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + affine(w, "attention.proj", (attention @ v).transpose(1, 2).flatten(2))
        x = x + affine(w, "mlp.fc2", F.gelu(affine(w, "mlp.fc1", norm(w, "norm2", x, 1e-6))))
    return x


def encode(pixels, weights, ids):
    """Tokens at the places `ids` only, chosen before the first block: the masked are not seen."""
    x = F.conv3d(pixels.transpose(1, 2), weights["encoder.embeddings.patch_embeddings.proj.weight"], stride=(2, 8, 8))
    x = x.flatten(2).transpose(1, 2) + weights["encoder.embeddings.patch_embeddings.proj.bias"]
    return norm(weights, "encoder.layernorm", transformer(x[:, ids], weights, "encoder.layer", ids), 1e-6)


def training_loss(pixels, weights, shown):
    """Of app/vjepa/train.py with loss_exp 1; the first `shown` tokens are the context."""
    every = torch.arange(pixels.shape[1] // 2 * GRID**2)
    early, late = every[:shown], every[shown:]
    truth = encode(pixels, weights, every)
    truth = F.layer_norm(truth, truth.shape[-1:])[:, late]
    guess = affine(weights, "predictor.embeddings.predictor_embeddings", encode(pixels, weights, early))
    mask = weights["predictor.embeddings.mask_tokens"][0].expand(len(guess), len(late), -1)
    guess = transformer(torch.cat([guess, mask], 1), weights, "predictor.layer", every)
    guess = affine(weights, "predictor.proj", norm(weights, "predictor.layernorm", guess, 1e-6)[:, shown:])
    return (guess - truth).abs().mean((1, 2))


@pytest.mark.parametrize(("context", "shown"), [(0.5, 2), (0.3, 1), (0.99, 3)])
def test_the_score_is_minus_the_training_loss(folder, make, context, shown):
    weights = load_file(folder / "model.safetensors")
    reward = make(context=context, fps=4)
    video = make_video(8)
    with torch.no_grad():
        expected = -training_loss(reward.pixels(video), weights, shown * GRID**2)
        got = reward(video, PROMPTS)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert got.diff().abs() > 1e-3


def test_it_is_not_what_transformers_own_forward_would_give(folder, make):
    """It shows the future to the context, keeps the target's scale, takes another mask token."""
    reward, video = make(fps=4), make_video(8)
    ids = torch.arange(4 * GRID**2)[None].expand(2, -1)
    masks = {"context_mask": [ids[:, : 2 * GRID**2]], "target_mask": [ids[:, 2 * GRID**2 :]]}
    with torch.no_grad():
        out = VJEPA2Model.from_pretrained(folder)(reward.pixels(video), **masks).predictor_output
        theirs = -(out.last_hidden_state - out.target_hidden_state).abs().mean((1, 2))
        assert ((reward(video, PROMPTS) - theirs).abs() > 1e-2).all()


def test_the_future_is_hidden_from_the_context(make):
    """A change of the last frame moves the truth, not the prediction."""
    reward, seen = make(fps=4), []
    predictor = reward.model.predictor
    forward = predictor.forward
    predictor.forward = lambda *a: seen.append(forward(*a)) or seen[-1]
    video = make_video(8)
    other = video.clone()
    other[:, :, -1] = 1 - other[:, :, -1]
    first, second = reward(video, PROMPTS), reward(other, PROMPTS)
    assert torch.equal(seen[0].last_hidden_state, seen[1].last_hidden_state)
    assert (first - second).abs().min() > 1e-4


@pytest.mark.parametrize("size", PHOTOGRAPH_SIZES)
def test_pixels_equal_the_published_processor(make, size):
    reward = make()
    reward.model.config.crop_size = 256
    for image in photograph_and_noise(*size):
        theirs = VJEPA2VideoProcessor()(image[None], return_tensors="pt").pixel_values_videos[0]
        ours = reward.pixels(image[None, :, None] / 255)[0]
        assert ours.shape == theirs.shape == (1, 3, 256, 256)
        assert_grey_levels((ours - theirs) * torch.tensor([0.229, 0.224, 0.225])[:, None, None] * 255)


def test_frames():
    assert clip_frames(125, 24) == list(range(0, 120, 6))  # 4 a second, an even number
    assert clip_frames(400, 24) == list(range(0, 384, 6))  # at most 64
    assert clip_frames(17, 24) == [0, 5, 11, 16]  # a short one faster, for 4
    assert clip_frames(5, 2) == [0, 1, 2, 3]  # slower than that: every one
    assert clip_frames(9, 4) == list(range(8))
    assert clip_frames(4, 30) == [0, 1, 2, 3]
    times = [i / 40 for i in range(20)] + [i / 5 for i in range(3, 13)]  # slower later; 4 a second of 2.6 s
    chosen = clip_frames(30, 30 / 2.6, times)
    assert [times[i] for i in chosen] == pytest.approx([i / 4 for i in range(10)], abs=0.101)


def test_the_callers_frame_rate_goes_before_the_setting(make):
    video = make_video(33, batch=1)
    frames = video[:, :, ::3][:, :, :10]
    torch.testing.assert_close(make(fps=24)(video, PROMPTS[:1], fps=12), make(fps=4)(frames, PROMPTS[:1]))


@every_video_check
def test_as_any_video_reward(check, make):
    check(lambda **settings: make(fps=4, **settings), make_video(6, 41, 56))


def test_what_is_refused(make):
    with pytest.raises(RewardError, match="context=1.0"):
        make(context=1.0)
    with pytest.raises(RewardError, match="3 frame"):
        make()(make_video(3), PROMPTS)
