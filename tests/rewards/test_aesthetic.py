"""Aesthetic predictors: published values of their heads, the path from pixels, and files."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reward_checks import PROMPTS, as_is, every_check, make_video, same, to_pil
from safetensors.torch import save_file
from straight_line_vit import affine, attention, clip_layers, norm, patches, unit
from tiny_clip import save_transformers_clip
from tiny_judges import SIZE, as_open_clip, clip, clip_pixels, siglip
from transformers import SiglipImageProcessorPil

from rewards import RewardError, load_reward
from rewards.common.heads import LinearLayers, load_head
from rewards.models.aesthetic import Aesthetic, AestheticV1, AestheticV25

DATA = Path(__file__).parents[3] / "shared" / "data"
LAYERS = {"aesthetic": (0, 2, 4, 6, 7), "aesthetic_v2_5": (0, 2, 4, 6, 8)}
PREFIX = {"aesthetic": "layers.", "aesthetic_v1": "", "aesthetic_v2_5": "scoring_head."}
KINDS = {"aesthetic": Aesthetic, "aesthetic_v1": AestheticV1, "aesthetic_v2_5": AestheticV25}


def head(name):
    torch.manual_seed(0)
    if name == "aesthetic_v1":
        return torch.nn.Linear(24, 1)
    layers = LinearLayers(24) if name == "aesthetic" else LinearLayers(48, dropout_before_last=True)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.mul_(3)
    return layers


def make(name, **options):
    return KINDS[name](head(name), model=siglip() if name == "aesthetic_v2_5" else clip(), **options)


@pytest.mark.parametrize("name", KINDS)
@every_check
def test_as_any_reward_of_frames(check, name):
    if check.__name__ != "each_prompt_is_encoded_once":  # no prompt is read
        check(lambda **options: make(name, **options))


# ---------------------------------------- published values of the heads


def on_published_head(name, file, embeds):
    if not (DATA / file).exists():
        pytest.skip(f"no {file} in ../shared/data")
    return load_head(name, str(DATA / file), KINDS[name].head_prefix, KINDS[name].build_head)(embeds).flatten()


def ratings():
    if not (DATA / "clip_l14_rating0.npy").exists():
        pytest.skip("no embeddings in ../shared/data")
    return torch.from_numpy(np.concatenate([np.load(DATA / f"clip_l14_rating{i}.npy") for i in range(10)])).float()


def test_published_values_of_v1():
    golden = [-2.4579, -0.1379, 1.8951, 3.5849, 5.0997, 6.4701, 7.7870, 9.0480, 10.2264, 11.3044]
    scores = on_published_head("aesthetic_v1", "sa_0_4_vit_l_14_linear.pth", ratings())
    torch.testing.assert_close(scores, torch.tensor(golden), atol=1e-3, rtol=0)


def test_published_values_of_v2():
    golden = [1.6555, 2.3593, 3.0698, 3.6725, 4.2380, 4.7010, 5.0731, 5.3654, 5.5767, 5.7468]
    scores = on_published_head("aesthetic", "sac+logos+ava1-l14-linearMSE.pth", ratings())
    torch.testing.assert_close(scores, torch.tensor(golden), atol=1e-3, rtol=0)


def test_published_values_of_v2_5():
    embeds = torch.stack([torch.zeros(1152), torch.full((1152,), 1152**-0.5)])
    scores = on_published_head("aesthetic_v2_5", "aesthetic_predictor_v2_5.pth", embeds)
    torch.testing.assert_close(scores, torch.tensor([1.9390, 3.6183]), atol=1e-3, rtol=0)


def test_v2_is_linear_and_so_has_no_ceiling():
    weights = LinearLayers(5).double()
    x = torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(weights(3 * x[:1] - 2 * x[1:]), 3 * weights(x[:1]) - 2 * weights(x[1:]))


# ---------------------------------------- from pixels to score by another route


def by_hand(name, embeds):
    state = {key: value for key, value in head(name).state_dict().items()}
    if name == "aesthetic_v1":
        return (embeds @ state["weight"].T + state["bias"]).flatten()
    for i in LAYERS[name]:
        embeds = embeds @ state[f"{i}.weight"].T + state[f"{i}.bias"]
    return embeds.flatten()


@pytest.mark.parametrize("name", ["aesthetic", "aesthetic_v1"])
def test_it_is_the_head_on_unit_embeddings(name):
    """The same weights in open_clip, the published processor, and the head written out."""
    frames, model = as_is(SIZE), as_open_clip(clip().model, quick_gelu=True)
    with torch.no_grad():
        embeds = model.encode_image(clip_pixels(frames))
    scores = make(name)(frames, PROMPTS)
    same(scores, by_hand(name, unit(embeds)))
    assert scores.diff().abs() > 1e-3


def siglip_by_hand(w, pixels, heads=4):
    """SigLIP's pooling: a probe attends to all patches, then a feed-forward (arXiv 2303.15343)."""
    x = patches(w, "embeddings.patch_embedding", pixels) + w["embeddings.position_embedding.weight"]
    gelu = lambda x: F.gelu(x, approximate="tanh")
    x = norm(w, "post_layernorm", clip_layers(w, x, heads, 1e-6, activation=gelu), 1e-6)
    matrices, biases = w["head.attention.in_proj_weight"].chunk(3), w["head.attention.in_proj_bias"].chunk(3)
    q, k, v = (
        y @ m.T + b for y, m, b in zip((w["head.probe"].expand(len(x), -1, -1), x, x), matrices, biases, strict=True)
    )
    x = affine(w, "head.attention.out_proj", attention(q, k, v, heads))
    h = norm(w, "head.layernorm", x, 1e-6)
    return (x + affine(w, "head.mlp.fc2", gelu(affine(w, "head.mlp.fc1", h))))[:, 0]


def test_v2_5_is_the_head_on_the_unit_pooled_embedding():
    frames = as_is(SIZE)
    processor = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    pixels = processor(to_pil(frames[:, :, 0]), return_tensors="pt").pixel_values
    scores = make("aesthetic_v2_5")(frames, PROMPTS)
    same(scores, by_hand("aesthetic_v2_5", unit(siglip_by_hand(siglip().model.state_dict(), pixels))))
    assert scores.diff().abs() > 1e-3


# ---------------------------------------- files


def said(name="aesthetic", **kwargs):
    with pytest.raises(RewardError) as caught:
        load_reward(name, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def published_head(name, path, dtype=torch.float32):
    state = {PREFIX[name] + key: value.to(dtype) for key, value in head(name).state_dict().items()}
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", KINDS)
def test_a_published_head_is_read(tmp_path, name, suffix):
    """That of v2.5 is in bfloat16; it computes in float32 all the same."""
    dtype = torch.bfloat16 if name == "aesthetic_v2_5" else torch.float32
    path = published_head(name, tmp_path / f"head{suffix}", dtype)
    encoder = siglip() if name == "aesthetic_v2_5" else clip()
    reward = load_reward(name, head=path, model=encoder)
    same(reward(make_video(), PROMPTS), make(name)(make_video(), PROMPTS), 1e-5 if dtype == torch.float32 else 0.02)
    assert {parameter.dtype for parameter in reward.head.parameters()} == {torch.float32}


def test_the_clip_comes_from_a_folder(tmp_path):
    folder = str(save_transformers_clip(tmp_path / "clip"))
    path = published_head("aesthetic", tmp_path / "head.pth")
    assert load_reward("aesthetic", head=path, model=folder)(make_video(), PROMPTS).isfinite().all()


def test_siglip_comes_from_a_folder_in_the_published_names(tmp_path):
    """The hub has both halves under `vision_model.` and `text_model.`, as older transformers."""
    from transformers import SiglipConfig, SiglipTextConfig

    model = siglip().model
    text = SiglipTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    SiglipConfig(text_config=text.to_dict(), vision_config=model.config.to_dict()).save_pretrained(tmp_path)
    state = {f"vision_model.{key}": value.contiguous() for key, value in model.state_dict().items()}
    state |= {"logit_scale": torch.zeros(1), "text_model.head.weight": torch.zeros(4, 4)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AestheticV25(head("aesthetic_v2_5"), str(tmp_path))
    same(loaded(make_video(), PROMPTS), make("aesthetic_v2_5")(make_video(), PROMPTS))
    del state["vision_model.head.probe"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"without (vision_model\.)?head\.probe"):
        AestheticV25(head("aesthetic_v2_5"), str(tmp_path))


def test_missing_image_models_are_named(tmp_path):
    path = published_head("aesthetic", tmp_path / "head.pth")
    assert "openai/clip-vit-large-patch14" in said(head=path)
    path = published_head("aesthetic_v2_5", tmp_path / "v2_5.pth")
    message = said("aesthetic_v2_5", head=path)
    assert "google/siglip-so400m-patch14-384: 3.5 GB, Apache-2.0" in message
    assert "`model` in reward_kwargs.aesthetic_v2_5" in message
    assert "no file at" in said(head="absent.pth")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("name", ["head.pth", "head.safetensors"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    message = said(head=str(tmp_path / name))
    assert f"on reading {tmp_path / name}" in message
    assert "download the file again" in message.lower()


def test_another_head_is_refused(tmp_path):
    message = said(head=published_head("aesthetic_v1", tmp_path / "v1.pth"))
    assert "where 0.bias is missing" in message


def test_a_head_for_another_clip_is_named(tmp_path):
    save_file({f"layers.{k}": v for k, v in LinearLayers(768).state_dict().items()}, tmp_path / "head.safetensors")
    reward = Aesthetic(str(tmp_path / "head.safetensors"), clip())
    with pytest.raises(RewardError, match="got width 24; expected embeddings of width 768"):
        reward(make_video(), PROMPTS)
