"""Subject and background consistency: scores by another route, layouts, missing weights."""

import json

import pytest
import torch
import torch.nn.functional as F
from layouts import layout_of, published_layout
from reward_checks import PROMPTS, every_video_check, to_pil
from safetensors.torch import save_file
from straight_line_vit import layer, norm, part, patches
from tiny_clip import save_transformers_clip

from rewards import RewardError, load_reward
from rewards.common.clip_models import TransformersClip
from rewards.common.preprocess import preprocess
from rewards.models.consistency import BackgroundConsistency, Dino, SubjectConsistency, consistency

WIDTH, LAYERS, HEADS, PATCH, SIZE = 16, 2, 2, 8, 32
SETTINGS = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "patch_size": PATCH,
    "image_size": SIZE,
}


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


# ---------------------------------------- the measure


def test_the_measure_by_hand():
    """Angles 0, 60, 90, 180: cosines to the previous .5, .866, 0; to the first .5, 0, 0."""
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


# ---------------------------------------- DINO by another route


NAMES = {"norm1": "layernorm_before", "norm2": "layernorm_after", "out": "attention.output.dense"}
NAMES |= {name[0]: f"attention.attention.{name}" for name in ("query", "key", "value")}
NAMES |= {"fc1": "intermediate.dense", "fc2": "output.dense"}


def dino_by_hand(state, pixels_N3HW):
    """facebookresearch/dino's VisionTransformer, straight through, on the published names."""
    x = patches(state, "embeddings.patch_embeddings.projection", pixels_N3HW)
    table, side = state["embeddings.position_embeddings"], SIZE // PATCH
    grid = table[:, 1:].reshape(1, side, side, WIDTH).permute(0, 3, 1, 2)
    if pixels_N3HW.shape[-2:] != (SIZE, SIZE):
        factors = tuple((pixels // PATCH + 0.1) / side for pixels in pixels_N3HW.shape[-2:])
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
    x = x + grid.flatten(2).transpose(1, 2)
    x = torch.cat([(state["embeddings.cls_token"] + table[:, :1]).expand(len(x), -1, -1), x], dim=1)
    for i in range(LAYERS):
        x = layer(part(state, f"encoder.layer.{i}."), x, HEADS, NAMES, 1e-6)
    return norm(state, "layernorm", x, 1e-6)[:, 0]


@pytest.mark.parametrize("preprocessing", ["vbench", "vbench_mp4"])
@pytest.mark.parametrize("size", [(40, 52), (60, 44), (32, 32), (32, 36)])
def test_subject_consistency_equals_dino_by_hand(dino, state, size, preprocessing):
    """Published weights through transformers' renaming, and frames of any shape."""
    video = make_video(4, *size)
    scores = SubjectConsistency(dino, preprocessing=preprocessing)(video, PROMPTS)
    fit = {"vbench": "whole", "vbench_mp4": "mp4_whole"}[preprocessing]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = []
    for sample in video:
        pixels = preprocess(sample.transpose(0, 1), SIZE, mean, std, fit, "bilinear")
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
        pixels = processor(to_pil(sample.transpose(0, 1)), return_tensors="pt").pixel_values
        expected.append(vbench(model.get_image_features(pixel_values=pixels).pooler_output))
    scores = BackgroundConsistency(clip)(video, PROMPTS)
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)
    assert scores.diff().abs() > 1e-4


# ---------------------------------------- the contract


@every_video_check
def test_as_any_video_reward(check, reward):
    check(reward, make_video(3))


def test_mp4_files_are_resized_as_vbench_does(reward):
    made = reward(preprocessing="vbench_mp4")
    assert made.embedder.fit in ("mp4_whole", "mp4_shortest")
    assert (made(make_video(), PROMPTS) - reward()(make_video(), PROMPTS)).abs().min() > 1e-6
    with pytest.raises(RewardError, match="got preprocessing='mp4'; expected one of vbench, vbench_mp4"):
        reward(preprocessing="mp4")


def test_frames_are_chosen_as_elsewhere(reward):
    video = make_video(5)
    chosen = reward(num_frames=3)(video, PROMPTS)
    torch.testing.assert_close(chosen, reward()(video[:, :, [0, 2, 4]], PROMPTS), atol=1e-6, rtol=0)
    torch.testing.assert_close(reward(num_frames="4 fps")(video, PROMPTS, fps=8), chosen, atol=1e-6, rtol=0)


def test_an_image_is_refused(reward):
    with pytest.raises(RewardError, match=r"_consistency': got 1 frame\(s\); expected at least 2"):
        reward()(make_video(1), PROMPTS)


# ---------------------------------------- weights


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
