"""CLIP score: both backends against their own library's route, gradient, chunks, dtypes, and missing weights."""

import json
import shutil
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layouts import layout_of, published_layout
from PIL import Image
from tiny_clip import SIZE, save_open_clip, save_transformers_clip

from rewards import RewardError, RewardMix, frames_needed, load_reward, probe
from rewards.clip import ClipScore
from rewards.clip_models import SIZES, guess_backend

PROMPTS = ["a red circle moves", "a dog on the beach"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


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


def make_video(frames=5, size=SIZE, batch=2):
    """Levels of 1/255, so that an image file holds the same."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, frames, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(frames, size, size), mode="trilinear")
    return (smooth * 255).round() / 255


def test_the_probe_passes(model):
    report = probe(load_reward("clip_score", model=model), (3, 5, 48, 40))
    assert report.frames == 1


def test_transformers_equals_the_library_route(folders):
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    clip = CLIPModel.from_pretrained(folders["transformers"]).eval()
    video = make_video()
    images = [Image.fromarray(to_uint8(sample[:, 0])) for sample in video]
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    pixels = processor(images, return_tensors="pt").pixel_values
    tokens = AutoTokenizer.from_pretrained(folders["transformers"])(PROMPTS, padding=True, return_tensors="pt")
    logits = clip(pixel_values=pixels, **tokens).logits_per_image.diagonal()
    scores = ClipScore(str(folders["transformers"]))(video[:, :, :1], PROMPTS)
    torch.testing.assert_close(scores, logits / clip.logit_scale.exp(), atol=1e-5, rtol=0)
    assert scores.diff().abs() > 0.01


def test_open_clip_equals_the_library_route(folders):
    import open_clip

    source = f"local-dir:{folders['open_clip']}"
    clip, _, preprocess = open_clip.create_model_and_transforms(source)
    video = make_video()
    pixels = torch.stack([preprocess(Image.fromarray(to_uint8(sample[:, 0]))) for sample in video])
    images = clip.eval().encode_image(pixels, normalize=True)
    texts = clip.encode_text(open_clip.get_tokenizer(source)(PROMPTS), normalize=True)
    scores = ClipScore(source)(video[:, :, :1], PROMPTS)
    torch.testing.assert_close(scores, (images * texts).sum(-1), atol=1e-5, rtol=0)
    assert scores.diff().abs() > 0.01


def to_uint8(frame_CHW):
    return (frame_CHW * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)


def test_open_clip_preprocessing_follows_the_model(tmp_path, monkeypatch):
    import open_clip

    own = {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}
    source = f"local-dir:{save_open_clip(tmp_path / 'squash', preprocess=own)}"
    _, _, preprocess = open_clip.create_model_and_transforms(source)
    clip, seen = ClipScore(source).clip, []
    monkeypatch.setattr(clip, "encode_images", lambda pixels: seen.append(pixels) or pixels.mean(dim=(2, 3)))
    frame = make_video(size=SIZE)[:1, :, 0, :, 4:28]
    clip.embed(frame)
    theirs = preprocess(Image.fromarray(to_uint8(frame[0])))
    assert ((seen[0][0] - theirs) * 0.25 * 255).abs().max() < 2


@pytest.mark.parametrize("preprocess", [{"resize_mode": "longest"}, {"interpolation": "bilinear"}])
def test_other_preprocessing_is_refused(tmp_path, preprocess):
    folder = save_open_clip(tmp_path / "other", preprocess=preprocess)
    with pytest.raises(RewardError, match="'shortest' or 'squash' with bicubic"):
        ClipScore(str(folder))


def test_gradient_equals_finite_difference(model):
    """Directional derivative in float64, from the pixels through resize, crop, clamp and model."""
    reward = ClipScore(model, dtype="float64", frames="all")
    video = make_video(frames=2, size=37).double()[..., 3:].clamp(0.05, 0.95).requires_grad_()
    direction = torch.randn(video.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(reward(video, PROMPTS).sum(), video)
    with torch.no_grad():
        ahead, behind = (reward(video + step * direction, PROMPTS).sum() for step in (1e-5, -1e-5))
    derivative = (ahead - behind) / 2e-5
    assert derivative.abs() > 1e-3
    torch.testing.assert_close((grad * direction).sum(), derivative, rtol=1e-6, atol=1e-9)


def test_the_score_is_the_mean_over_evenly_spaced_frames(model):
    video = make_video(frames=5)
    every = torch.stack([ClipScore(model)(video[:, :, i : i + 1], PROMPTS) for i in range(5)])
    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(ClipScore(model, frames="all")(video, PROMPTS), every.mean(0), **close)
    three = ClipScore(model, frames="all", num_frames=3)
    torch.testing.assert_close(three(video, PROMPTS), every[[0, 2, 4]].mean(0), **close)


def test_in_a_mix_only_the_first_frame_counts(model):
    video = make_video(frames=5)
    reward = ClipScore(model)
    total, _ = RewardMix({"clip_score": reward})(video, PROMPTS)
    torch.testing.assert_close(total, reward(video[:, :, :1], PROMPTS))
    assert frames_needed(reward, 17) == 1


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_change_nothing(model, chunk):
    def scores_and_gradient(**kwargs):
        video = make_video(frames=4).requires_grad_()
        scores = ClipScore(model, frames="all", **kwargs)(video, PROMPTS)
        return scores.detach(), torch.autograd.grad(scores.sum(), video)[0]

    for whole, chunked in zip(scores_and_gradient(), scores_and_gradient(chunk=chunk), strict=True):
        torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-5)


def test_a_batch_equals_single_videos(model):
    reward, video = ClipScore(model, frames="all"), make_video()
    single = torch.cat([reward(video[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(reward(video, PROMPTS), single, atol=1e-6, rtol=0)


def test_a_bfloat16_model_gives_float32_scores(model):
    scores = ClipScore(model, dtype="bfloat16")(make_video(), PROMPTS)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    torch.testing.assert_close(scores, ClipScore(model)(make_video(), PROMPTS), atol=0.05, rtol=0)


def test_autocast_does_not_reach_inside(model):
    reward = ClipScore(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = reward(make_video(), PROMPTS)
    assert torch.equal(inside, reward(make_video(), PROMPTS))


def test_text_is_embedded_once_per_prompt(model, monkeypatch):
    reward, asked = ClipScore(model), []
    encode = reward.clip.encode_text
    monkeypatch.setattr(reward.clip, "encode_text", lambda prompts: asked.extend(prompts) or encode(prompts))
    video = torch.cat([make_video(), make_video()])
    first = reward(video, PROMPTS + PROMPTS)
    again = reward(video, PROMPTS + PROMPTS)
    assert asked == PROMPTS
    assert torch.equal(first, again)


def test_a_long_prompt_is_cut(model):
    assert ClipScore(model)(make_video(), ["dog " * 200] * 2).isfinite().all()


def test_evaluation_under_inference_mode_does_not_spoil_training(model):
    reward, video = ClipScore(model), make_video(size=41)
    with torch.inference_mode():
        reward(video, PROMPTS)
    reward(video.requires_grad_(), PROMPTS).sum().backward()


def test_it_is_frozen_and_stays_in_evaluation_mode(model):
    reward = ClipScore(model)
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    reward.train()
    assert not any(module.training for module in reward.modules())


# ---------------------------------------------------------------- choosing and missing


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
        ({"num_frames": 4}, ["num_frames=4", "frames='first'"]),
        ({"num_frames": 0, "frames": "all"}, ["num_frames=0"]),
    ],
)
def test_what_is_missing_or_wrong_is_said_quickly(kwargs, parts):
    started = time.perf_counter()
    with pytest.raises(RewardError) as caught:
        load_reward("clip_score", **kwargs)
    assert time.perf_counter() - started < 10
    for part in ["clip_score", "expected", *parts]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_dtype_is_named(folders):
    with pytest.raises(RewardError, match="dtype='int8'"):
        ClipScore(str(folders["transformers"]), dtype="int8")


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


# ---------------------------------------------------------------- the hub


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_a_hub_that_does_not_answer_is_asked_once(online, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr("rewards.weights._hub_answers", lambda endpoint: False)
    for kwargs in [{}, {"model": "ViT-L-14-quickgelu", "pretrained": "openai"}]:
        started = time.perf_counter()
        with pytest.raises(RewardError, match="no weights for"):
            load_reward("clip_score", **kwargs)
        assert time.perf_counter() - started < 10
    assert constants.HF_HUB_OFFLINE is False


def test_a_hub_that_can_not_be_reached_does_not_answer(monkeypatch):
    from rewards.weights import _hub_answers

    assert _hub_answers("http://127.0.0.1:9") is False


def test_a_local_folder_asks_no_hub(model, online, monkeypatch):
    def asked(endpoint):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("rewards.weights._hub_answers", asked)
    ClipScore(model)


# ---------------------------------------------------------------- without weights


def test_full_size_has_the_published_layout():
    with torch.device("meta"):
        reward = ClipScore.random_init()
    assert layout_of(reward.clip.model) == published_layout("openai_clip_vit_large_patch14")
    assert reward.clip.size == 224


def test_random_weights_still_tell_prompts_and_pictures_apart(monkeypatch):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {"projection_dim": 24, "text_config": tower, "vision_config": tower | {"image_size": SIZE, "patch_size": 8}}
    monkeypatch.setitem(SIZES, "tiny", sizes)
    torch.manual_seed(0)
    reward = ClipScore.random_init("tiny", dtype="float64")
    video = make_video()
    scores = reward(video, PROMPTS)
    assert scores.dtype == torch.float64
    assert scores.isfinite().all()
    assert (reward(video, PROMPTS[::-1]) - scores).abs().min() > 1e-5
    assert (reward(video.flip(0), PROMPTS) - scores).abs().min() > 1e-5
