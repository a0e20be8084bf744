"""CLIP score: both backends against their library's route, and missing weights."""

import json
import shutil
import socket

import pytest
import torch
from reward_checks import PROMPTS, as_is, every_check, make_video, same, to_pil
from tiny_clip import SIZE, save_open_clip, save_transformers_clip
from tiny_judges import as_open_clip, clip, clip_pixels

from rewards import RewardError, load_reward
from rewards.common.clip_models import SIZES, guess_backend
from rewards.models.clip import ClipScore


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("clip")
    return {
        "transformers": save_transformers_clip(root / "transformers"),
        "open_clip": save_open_clip(root / "open_clip"),
        "open_clip_bpe": save_open_clip(root / "open_clip_bpe", own_tokenizer=False),
    }


@pytest.fixture(params=["transformers", "open_clip", "open_clip_bpe"])
def model(request, folders):
    return str(folders[request.param])


@every_check
def test_as_any_reward_of_frames(check, model):
    check(lambda **options: ClipScore(model, **options))


def test_open_clip_equals_transformers_on_the_same_weights():
    """Each by its own code, for both activations: OpenAI's models have the quick one."""
    frames = as_is(SIZE)
    for activation in ("gelu", "quick_gelu"):
        theirs = clip(hidden_act=activation)
        other = as_open_clip(theirs.model, quick_gelu=activation == "quick_gelu")
        tokens = theirs.tokenizer(PROMPTS, padding="max_length", max_length=24, return_tensors="pt").input_ids
        with torch.no_grad():
            image = other.encode_image(theirs.pixels(frames[:, :, 0]), normalize=True)
            text = other.encode_text(tokens, normalize=True)
        scores = ClipScore(theirs)(frames, PROMPTS)
        same(scores, (image * text).sum(1))
        assert scores.diff().abs() > 0.01


def test_transformers_equals_the_library_route(folders):
    from transformers import AutoTokenizer, CLIPModel

    clip = CLIPModel.from_pretrained(folders["transformers"]).eval()
    video = as_is(SIZE)
    tokens = AutoTokenizer.from_pretrained(folders["transformers"])(PROMPTS, padding=True, return_tensors="pt")
    logits = clip(pixel_values=clip_pixels(video), **tokens).logits_per_image.diagonal()
    scores = ClipScore(str(folders["transformers"]))(video[:, :, :1], PROMPTS)
    torch.testing.assert_close(scores, logits / clip.logit_scale.exp(), atol=1e-5, rtol=0)
    assert scores.diff().abs() > 0.01


def test_open_clip_equals_the_library_route(folders):
    import open_clip

    source = f"local-dir:{folders['open_clip']}"
    clip, _, preprocess = open_clip.create_model_and_transforms(source)
    video = as_is(SIZE)
    pixels = torch.stack([preprocess(image) for image in to_pil(video[:, :, 0])])
    images = clip.eval().encode_image(pixels, normalize=True)
    texts = clip.encode_text(open_clip.get_tokenizer(source)(PROMPTS), normalize=True)
    scores = ClipScore(source)(video[:, :, :1], PROMPTS)
    torch.testing.assert_close(scores, (images * texts).sum(-1), atol=1e-5, rtol=0)
    assert scores.diff().abs() > 0.01


def test_open_clip_preprocessing_follows_the_model(tmp_path, monkeypatch):
    import open_clip

    own = {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}
    source = f"local-dir:{save_open_clip(tmp_path / 'squash', preprocess=own)}"
    _, _, preprocess = open_clip.create_model_and_transforms(source)
    clip, seen = ClipScore(source).clip, []
    monkeypatch.setattr(clip, "encode_images", lambda pixels: seen.append(pixels) or pixels.mean(dim=(2, 3)))
    frame = as_is(SIZE)[:1, :, 0, :, 4:28]
    clip.embed(frame)
    theirs = preprocess(to_pil(frame)[0])
    assert ((seen[0][0] - theirs) * 0.25 * 255).abs().max() < 2


@pytest.mark.parametrize("preprocess", [{"resize_mode": "longest"}, {"interpolation": "bilinear"}])
def test_other_preprocessing_is_refused(tmp_path, preprocess):
    folder = save_open_clip(tmp_path / "other", preprocess=preprocess)
    with pytest.raises(RewardError, match="'shortest' or 'squash' with bicubic"):
        ClipScore(str(folder))


# ---------------------------------------- choosing and missing


@pytest.mark.parametrize(
    ("model", "pretrained", "backend"),
    [
        ("openai/clip-vit-large-patch14", None, "transformers"),
        ("ViT-H-14", "laion2b_s32b_b79k", "open_clip"),
        ("ViT-H-14", None, "open_clip"),
        ("hf-hub:org/name", None, "open_clip"),
        ("local-dir:/somewhere", None, "open_clip"),
    ],
)
def test_the_backend_is_told_from_the_model(model, pretrained, backend):
    assert guess_backend(model, pretrained) == backend


def test_the_backend_of_a_folder(folders):
    assert guess_backend(str(folders["transformers"])) == "transformers"
    assert guess_backend(str(folders["open_clip"])) == "open_clip"


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({}, ["openai/clip-vit-large-patch14", "1.7 GB", "MIT", "`model` in reward_kwargs.clip_score", "local path"]),
        ({"model": "someone/unheard-of"}, ["someone/unheard-of", "size unknown", "`model`"]),
        (
            {"model": "ViT-L-14-quickgelu", "pretrained": "openai"},
            ["timm/vit_large_patch14_clip_224.openai", "`pretrained`"],
        ),
        ({"model": "ViT-L-14-quickgelu", "pretrained": "absent.pt"}, ["absent.pt", "`pretrained`"]),
        ({"model": "hf-hub:someone/unheard-of"}, ["someone/unheard-of", "`model`"]),
        ({"model": "ViT-L-14-quickgelu"}, ["tags: openai, metaclip_400m", "random weights"]),
        ({"model": "Vit-Nothing"}, ["no such model in open_clip"]),
        ({"model": "./absent/folder"}, ["./absent/folder", "a folder that exists"]),
        ({"model": "a/b", "backend": "clip"}, ["'transformers' or 'open_clip'"]),
    ],
)
def test_what_is_missing_or_wrong_is_said(kwargs, parts):
    with pytest.raises(RewardError) as caught:
        load_reward("clip_score", **kwargs)
    for part in ["clip_score", "expected", *parts]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_not_scored_at_random(folders, tmp_path):
    for backend, weights in [("open_clip", "open_clip_model.safetensors"), ("transformers", "model.safetensors")]:
        folder = shutil.copytree(folders[backend], tmp_path / backend)
        (folder / weights).unlink()
        with pytest.raises(RewardError, match="no weights for"):
            ClipScore(str(folder))


def test_incomplete_weights_are_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders["transformers"], tmp_path / "partial")
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if "visual_projection" not in k}, folder / "model.safetensors")
    with pytest.raises(RewardError, match=r"visual_projection\.weight"):
        ClipScore(str(folder))


def test_the_folder_need_not_name_its_schema(folders):
    plain, schema = str(folders["open_clip"]), f"local-dir:{folders['open_clip']}"
    assert json.loads((folders["open_clip"] / "open_clip_config.json").read_text())
    video = make_video()
    assert torch.equal(ClipScore(plain)(video, PROMPTS), ClipScore(schema)(video, PROMPTS))


# ---------------------------------------- the hub


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_a_hub_that_does_not_answer_is_asked_once(online, monkeypatch):
    from huggingface_hub import constants

    from rewards.common.weights import _is_reachable

    asked = []

    def unknown(host, *rest, **how):
        asked.append(host)
        raise socket.gaierror("no such name")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    _is_reachable.cache_clear()
    for kwargs in [{}, {"model": "ViT-L-14-quickgelu", "pretrained": "openai"}]:
        with pytest.raises(RewardError, match="no weights for"):
            load_reward("clip_score", **kwargs)
    _is_reachable.cache_clear()
    assert len(asked) == 1
    assert constants.HF_HUB_OFFLINE is False


def test_a_hub_that_can_not_be_reached_does_not_answer(monkeypatch):
    from rewards.common.weights import _is_reachable

    assert _is_reachable("http://127.0.0.1:9") is False


def test_a_local_folder_asks_no_hub(model, online, monkeypatch):
    asked = []
    monkeypatch.setattr("rewards.common.weights._is_reachable", asked.append)
    ClipScore(model)
    assert asked == []


# ---------------------------------------- without weights


def test_random_weights_still_tell_prompts_and_pictures_apart(monkeypatch):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {"projection_dim": 24, "text_config": tower, "vision_config": tower | {"image_size": SIZE, "patch_size": 8}}
    monkeypatch.setitem(SIZES, "tiny", sizes)
    torch.manual_seed(0)
    reward = ClipScore.random_init("tiny", dtype="float64")
    video = make_video()
    scores = reward(video, PROMPTS)
    assert scores.dtype == torch.float64
    assert (reward(video, PROMPTS[::-1]) - scores).abs().min() > 1e-5
    assert (reward(video.flip(0), PROMPTS) - scores).abs().min() > 1e-5
