"""Subject and background consistency: scores by another route, gradients, layouts, and weights that are missing."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layouts import layout_of, published_layout
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import save_transformers_clip

from rewards import RewardError, load_reward, probe
from rewards.common.clip_models import TransformersClip
from rewards.common.preprocess import preprocess
from rewards.models.consistency import BackgroundConsistency, Dino, SubjectConsistency, consistency

PROMPTS = ["a", "b"]
WIDTH, LAYERS, HEADS, PATCH, SIZE = 16, 2, 2, 8, 32
SETTINGS = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "patch_size": PATCH,
    "image_size": SIZE,
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def published_shape(key, shape):
    """A shape of the published layout, with the sizes of the tiny model."""
    positions = (SIZE // PATCH) ** 2 + 1
    return tuple({768: WIDTH, 3072: 2 * WIDTH, 16: PATCH, 197: positions}.get(n, n) for n in shape)


@pytest.fixture(scope="module")
def state():
    """Random weights of a tiny DINO under the names of the published file."""
    generator = torch.Generator().manual_seed(0)
    layout = published_layout("facebook_dino_vitb16")
    layout = {
        key: shape for key, shape in layout.items() if "encoder.layer." not in key or int(key.split(".")[2]) < LAYERS
    }
    return {
        key: torch.randn(published_shape(key, shape), generator=generator) * (0.3 if len(shape) > 1 else 0.5)
        for key, shape in layout.items()
    }


@pytest.fixture(scope="module")
def dino(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("dino")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", **SETTINGS}))
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(save_transformers_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(params=["subject_consistency", "background_consistency"])
def reward(request, dino, clip):
    def make(**settings):
        model = dino if request.param == "subject_consistency" else clip
        return load_reward(request.param, model=model, **settings)

    return make


def make_video(frames=4, height=40, width=52, batch=2):
    """Grey levels, drifting, so that the cosines differ."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, frames, 6, 6, generator=generator)
    return (F.interpolate(coarse, size=(frames, height, width), mode="trilinear") * 255).round() / 255


# ---------------------------------------------------------------- the measure


def test_the_measure_by_hand():
    """Angles of 0, 60, 90 and 180 degrees: cosines to the previous .5, .866, 0 and to the first .5, 0, -1 -> 0."""
    angles = torch.tensor([0.0, 60, 90, 180]).deg2rad()
    embeds = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    by_frame = [(0.5 + 0.5) / 2, (3**0.5 / 2 + 0) / 2, 0.0]
    assert consistency(embeds).item() == pytest.approx(sum(by_frame) / 3, abs=1e-6)
    assert consistency(embeds[:, :1].expand(-1, 5, -1)).item() == pytest.approx(1.0)


def vbench(embeds_NP):
    """The loop over frames, as VBench's two files go about it."""
    total = 0.0
    for i in range(1, len(embeds_NP)):
        previous, first = (F.cosine_similarity(embeds_NP[i], embeds_NP[j], dim=0).item() for j in (i - 1, 0))
        total += (max(0.0, previous) + max(0.0, first)) / 2
    return total / (len(embeds_NP) - 1)


# ---------------------------------------------------------------- DINO by another route


def dino_by_hand(state, pixels_N3HW):
    """facebookresearch/dino's VisionTransformer, straight through, on the published names."""

    def linear(x, key):
        return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]

    def norm(x, key):
        return F.layer_norm(x, (WIDTH,), state[f"{key}.weight"], state[f"{key}.bias"], eps=1e-6)

    patches = F.conv2d(
        pixels_N3HW,
        state["embeddings.patch_embeddings.projection.weight"],
        state["embeddings.patch_embeddings.projection.bias"],
        stride=PATCH,
    )
    table, side = state["embeddings.position_embeddings"], SIZE // PATCH
    height, width = patches.shape[-2:]
    grid = table[:, 1:].reshape(1, side, side, WIDTH).permute(0, 3, 1, 2)
    if pixels_N3HW.shape[-2:] != (SIZE, SIZE):
        factors = ((height + 0.1) / side, (width + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
    tokens = (patches + grid).flatten(2).transpose(1, 2)
    first = (state["embeddings.cls_token"] + table[:, :1]).expand(len(tokens), -1, -1)
    x = torch.cat([first, tokens], dim=1)
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        h = norm(x, f"{layer}.layernorm_before")
        q, k, v = (
            linear(h, f"{layer}.attention.attention.{n}").unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for n in ("query", "key", "value")
        )
        weights = (q @ k.transpose(-1, -2) / (WIDTH / HEADS) ** 0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{layer}.attention.output.dense")
        h = F.gelu(linear(norm(x, f"{layer}.layernorm_after"), f"{layer}.intermediate.dense"))
        x = x + linear(h, f"{layer}.output.dense")
    return norm(x, "layernorm")[:, 0]


@pytest.mark.parametrize("size", [(40, 52), (60, 44), (32, 32), (32, 36)])
def test_subject_consistency_equals_dino_by_hand(dino, state, size):
    """Published weights through transformers' renaming, and frames of any shape."""
    video = make_video(4, *size)
    scores = SubjectConsistency(dino)(video, PROMPTS)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = []
    for sample in video:
        pixels = preprocess(sample.transpose(0, 1), SIZE, mean, std, "whole", "bilinear")
        expected.append(vbench(dino_by_hand(state, pixels)))
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)
    assert scores.diff().abs() > 1e-3


def test_transformers_own_positions_would_score_otherwise(dino, state):
    """What `dino_positions` is for."""
    from transformers import ViTModel

    pixels = make_video(1, 40, 72)[:, :, 0]
    vit = ViTModel.from_pretrained(dino, add_pooling_layer=False)
    plain = vit(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    by_hand = dino_by_hand(state, pixels)
    assert (plain - by_hand).abs().max() > 1e-3
    Dino(vit)
    ours = vit(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    torch.testing.assert_close(ours, by_hand, atol=1e-5, rtol=1e-5)


def test_background_consistency_equals_the_library_route(clip):
    from transformers import CLIPImageProcessorPil, CLIPModel

    video = make_video(4, 32, 32)
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPImageProcessorPil(do_resize=False, crop_size=32)
    expected = []
    for sample in video:
        images = [(frame * 255).round().permute(1, 2, 0).numpy().astype(np.uint8) for frame in sample.transpose(0, 1)]
        pixels = processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
        expected.append(vbench(model.get_image_features(pixel_values=pixels).pooler_output))
    scores = BackgroundConsistency(clip)(video, PROMPTS)
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)
    assert scores.diff().abs() > 1e-4


# ---------------------------------------------------------------- the contract


def test_the_probe_passes(reward):
    assert probe(reward(), (3, 5, 40, 36)).frames == 5


def test_gradient_equals_finite_difference(reward):
    made = reward(dtype="float64")
    video = make_video(3).double().clamp(0.05, 0.95).requires_grad_()
    direction = torch.randn(video.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(made(video, PROMPTS).sum(), video)
    with torch.no_grad():
        ahead, behind = (made(video + step * direction, PROMPTS).sum() for step in (1e-6, -1e-6))
    derivative = (ahead - behind) / 2e-6
    assert derivative.abs() > 1e-4
    torch.testing.assert_close((grad * direction).sum(), derivative, rtol=1e-5, atol=1e-9)


def test_batches_chunks_frames_and_bfloat16(reward):
    made, video = reward(), make_video(5)
    whole = made(video, PROMPTS)
    single = torch.cat([made(video[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(single, whole, atol=1e-6, rtol=0)
    grads = []
    for settings in ({}, {"chunk": 3}):
        pixels = video.clone().requires_grad_()
        scores = reward(**settings)(pixels, PROMPTS)
        torch.testing.assert_close(scores.detach(), whole, atol=1e-6, rtol=0)
        grads.append(torch.autograd.grad(scores.sum(), pixels)[0])
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)
    chosen = reward(num_frames=3)(video, PROMPTS)
    torch.testing.assert_close(chosen, made(video[:, :, [0, 2, 4]], PROMPTS), atol=1e-6, rtol=0)
    torch.testing.assert_close(reward(num_frames="4 fps")(video, PROMPTS, fps=8), chosen, atol=1e-6, rtol=0)
    half = reward(dtype="bfloat16")(video, PROMPTS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole, atol=0.05, rtol=0)


def test_it_is_frozen_and_in_evaluation_mode(reward):
    made = reward().train()
    assert not any(p.requires_grad for p in made.parameters())
    assert not any(module.training for module in made.modules())


def test_an_image_is_refused(reward):
    with pytest.raises(RewardError, match=r"_consistency': got 1 frame\(s\); expected at least 2"):
        reward()(make_video(1), PROMPTS)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("subject_consistency", ["facebook/dino-vitb16", "343 MB", "Apache-2.0"]),
        ("background_consistency", ["openai/clip-vit-base-patch32", "605 MB", "MIT"]),
    ],
)
def test_missing_weights_are_named(name, parts):
    with pytest.raises(RewardError) as caught:
        load_reward(name)
    for part in [*parts, f"`model` in reward_kwargs.{name}", "local path"]:
        assert part in str(caught.value)


def test_incomplete_weights_are_refused(tmp_path, state, dino):
    save_file(
        {k: v for k, v in state.items() if "mlp" not in k and k != "layernorm.bias"}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", **SETTINGS}))
    with pytest.raises(RewardError, match=r"without layernorm\.bias .* expected a complete ViTModel"):
        SubjectConsistency(str(tmp_path))


def test_full_size_has_the_published_layout():
    with torch.device("meta"):
        subject, background = SubjectConsistency.random_init(), BackgroundConsistency.random_init()
    renames = {
        "encoder.layer.": "layers.",
        "attention.attention.": "attention.",
        "attention.output.dense": "attention.o_proj",
    }
    renames |= {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}
    renames |= {
        f"attention.{old}": f"attention.{new}_proj" for old, new in (("query", "q"), ("key", "k"), ("value", "v"))
    }
    published = published_layout("facebook_dino_vitb16")
    for old, new in renames.items():
        published = {key.replace(old, new): shape for key, shape in published.items()}
    assert layout_of(subject.embedder.vit) == published
    assert isinstance(background.embedder, TransformersClip)
    assert layout_of(background.embedder.model) == published_layout("openai_clip_vit_base_patch32")
    assert (subject.embedder.vit.config.image_size, background.embedder.size) == (224, 224)
