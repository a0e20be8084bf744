"""The aesthetic predictor: published values of its head, its path from pixels, and files that are missing or unsafe."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import save_transformers_clip

from rewards import RewardError, load_reward, probe
from rewards.aesthetic import Aesthetic, AestheticHead, load_head

DATA = Path(__file__).parents[2] / "shared" / "data"
PUBLISHED_HEAD = DATA / "sac+logos+ava1-l14-linearMSE.pth"
GOLDEN = [1.6555, 2.3593, 3.0698, 3.6725, 4.2380, 4.7010, 5.0731, 5.3654, 5.5767, 5.7468]
PROMPTS = ["a", "b"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return str(save_transformers_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def head_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_file(AestheticHead(24).state_dict(), path)
    return str(path)


def test_published_values_of_the_head():
    if not PUBLISHED_HEAD.exists():
        pytest.skip("no published head in ../shared/data")
    embeds = torch.from_numpy(np.concatenate([np.load(DATA / f"clip_l14_rating{i}.npy") for i in range(10)]))
    scores = load_head("aesthetic", PUBLISHED_HEAD)(embeds.float()).flatten()
    torch.testing.assert_close(scores, torch.tensor(GOLDEN), atol=1e-3, rtol=0)


def test_the_layout_of_the_head():
    shapes = {key: tuple(value.shape) for key, value in AestheticHead().state_dict().items()}
    sizes = [(0, 768, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)]
    weights = {f"layers.{i}.weight": (after, before) for i, before, after in sizes}
    assert shapes == weights | {f"layers.{i}.bias": (after,) for i, _, after in sizes}


def make_video(frames=3, dtype=torch.float32):
    return torch.rand(2, 3, frames, 40, 36, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_it_is_the_head_on_unit_embeddings(head_file, clip_folder):
    """By another route: transformers' own model and processor, and the head written out as products."""
    from safetensors.torch import load_file
    from transformers import CLIPImageProcessorPil, CLIPModel

    frame = (make_video()[:, :, 0, :32, :32] * 255).round()  # no resize
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    images = [image.permute(1, 2, 0).numpy().astype(np.uint8) for image in frame]
    pixels = processor(images, return_tensors="pt").pixel_values
    x = CLIPModel.from_pretrained(clip_folder).get_image_features(pixel_values=pixels).pooler_output
    x, state = x / x.norm(dim=-1, keepdim=True), load_file(head_file)
    for i in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    reward = Aesthetic(head_file, clip_folder)
    torch.testing.assert_close(reward(frame[:, :, None] / 255, PROMPTS), x.flatten(), atol=1e-5, rtol=0)


def test_the_probe_passes(head_file, clip_folder):
    assert probe(load_reward("aesthetic", head=head_file, model=clip_folder)).frames == 1


def test_gradient_equals_finite_difference(head_file, clip_folder):
    reward = Aesthetic(head_file, clip_folder, dtype="float64", frames="all")
    reward.head.double()
    video = make_video(frames=2, dtype=torch.float64).requires_grad_()
    direction = torch.randn(video.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(reward(video, PROMPTS).sum(), video)
    with torch.no_grad():
        ahead, behind = (reward(video + step * direction, PROMPTS).sum() for step in (1e-5, -1e-5))
    derivative = (ahead - behind) / 2e-5
    assert derivative.abs() > 1e-4
    torch.testing.assert_close((grad * direction).sum(), derivative, rtol=1e-6, atol=1e-10)


def test_frames_chunks_and_a_bfloat16_model(head_file, clip_folder):
    video, everything = make_video(), {"head": head_file, "model": clip_folder, "frames": "all"}
    whole = Aesthetic(**everything)(video, PROMPTS)
    torch.testing.assert_close(Aesthetic(**everything, chunk=2)(video, PROMPTS), whole, atol=1e-6, rtol=0)
    ends = Aesthetic(**everything, num_frames=2)(video, PROMPTS)
    torch.testing.assert_close(ends, Aesthetic(**everything)(video[:, :, [0, 2]], PROMPTS), atol=1e-6, rtol=0)
    half = Aesthetic(**everything, dtype="bfloat16")(video, PROMPTS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole, atol=0.05, rtol=0)


def said(**kwargs):
    with pytest.raises(RewardError) as caught:
        load_reward("aesthetic", **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_head_is_named():
    message = said()
    for part in ["trl-lib/ddpo-aesthetic-predictor", "3.7 MB", "Apache-2.0", "`head` in reward_kwargs.aesthetic"]:
        assert part in message


def test_missing_clip_weights_are_named(head_file):
    assert "openai/clip-vit-large-patch14" in said(head=head_file)
    assert "no file at" in said(head="absent.pth")


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(AestheticHead(24), tmp_path / "module.pth")
    message = said(head=str(tmp_path / "module.pth"))
    assert "a pickled module" in message
    assert "run code from the file" in message


def test_another_head_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, tmp_path / "v1.pth")
    assert "keys bias, weight" in said(head=str(tmp_path / "v1.pth"))


def test_a_head_for_another_clip_is_named(tmp_path, clip_folder):
    save_file(AestheticHead(768).state_dict(), tmp_path / "head.safetensors")
    reward = Aesthetic(str(tmp_path / "head.safetensors"), clip_folder)
    with pytest.raises(RewardError, match="got width 24; expected embeddings of width 768"):
        reward(make_video(), PROMPTS)
