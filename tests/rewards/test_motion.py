"""Motion degree: torchvision's forward, VBench's measure, the whole gradient, and weights."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layouts import layout_of, published_layout
from PIL import Image
from tiny_judges import tiny_raft
from torchvision.models.optical_flow import Raft_Large_Weights, raft_large

from rewards import RewardError, load_reward, probe
from rewards.models.motion import URL, MotionDegree, flow_pixels, longest_flow, optical_flow

PROMPTS = ["a", "b"]
INFO = {"fps": 8}


@pytest.fixture
def reward():
    return lambda **settings: load_reward("motion_degree", **({"weights": tiny_raft(), "size": 32} | settings))


def make_video(frames=4, height=40, width=56, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, frames, 8, 8, generator=generator, dtype=dtype)
    return F.interpolate(coarse, size=(frames, height, width), mode="trilinear")


# ---------------------------------------- the score by another route


def vbench_measure(flow_2HW):
    """The mean of the first 5 % of the sorted lengths, as VBench's dynamic_degree.py takes it."""
    lengths = np.sort(-np.hypot(*flow_2HW.numpy()).flatten())
    return abs(lengths[: int(lengths.size * 0.05)]).mean()


def test_the_score_equals_torchvisions_flow_and_vbenchs_measure(reward):
    video, model = make_video(), tiny_raft()
    expected = []
    for sample in video:
        pixels = flow_pixels(sample.transpose(0, 1), 32)
        with torch.no_grad():
            flows = model(pixels[:-1], pixels[1:])[-1]
        excess = [vbench_measure(flow) - 6 * 32 / 256 for flow in flows]
        expected.append(np.mean([1 / (1 + np.exp(-x / 0.5)) for x in excess]))
    scores = reward(temperature=0.5)(video, PROMPTS, **INFO)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=0)
    assert scores.diff().abs() > 1e-4
    assert 0.01 < scores.min() < 0.99


@pytest.mark.parametrize("updates", [1, 4])
def test_the_flow_is_torchvisions_last(updates):
    model, pixels = tiny_raft(), flow_pixels(make_video()[0].transpose(0, 1), 32)
    with torch.no_grad():
        flow, theirs = (f(pixels[:-1], pixels[1:]) for f in (lambda a, b: optical_flow(model, a, b, updates), model))
        theirs = model(pixels[:-1], pixels[1:], num_flow_updates=updates)[-1]
    torch.testing.assert_close(flow, theirs, atol=1e-5, rtol=1e-5)
    assert flow.abs().max() > 0.05


def test_the_longest_flow_by_hand():
    flow = torch.zeros(1, 2, 10, 20)
    flow[0, :, 3, :5] = torch.tensor([[3.0, 6, 9, 12, 15], [4, 8, 12, 16, 20]])  # 5, 10, 15, 20, 25 long
    assert longest_flow(flow).item() == pytest.approx((25 + 20 + 15 + 10 + 5) / 10)


@pytest.mark.parametrize(("width", "height"), [(832, 480), (480, 832), (300, 451), (64, 48)])
def test_preprocessing_matches_pil_and_torchvisions_preset(width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
    for image in (Image.fromarray(noise), Image.fromarray(noise).resize((width, height), Image.BICUBIC)):
        scale = 256 / min(image.size)
        target = [8 * round(side * scale / 8) for side in image.size]
        # Width first, in two calls, as in test_preprocess.
        narrowed = image.resize((target[0], image.height), Image.BICUBIC).resize(target, Image.BICUBIC)
        expected, _ = Raft_Large_Weights.C_T_SKHT_V2.transforms()(narrowed, narrowed)
        frames = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        ours = flow_pixels(frames, 256)[0]
        assert ours.shape == expected.shape
        assert min(ours.shape[1:]) == 256
        difference = (ours - expected).abs() / 2 * 255
        assert difference.mean() < 0.5
        assert difference.max() <= 4


# ---------------------------------------- the gradient


def directional(function, video):
    """Autograd's derivative along a random direction, and the central difference."""
    direction = torch.randn(video.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(function(video).sum(), video)
    with torch.no_grad():
        ahead, behind = (function(video + step * direction).sum() for step in (1e-7, -1e-7))
    return (grad * direction).sum(), (ahead - behind) / 2e-7


def test_gradient_equals_finite_difference(reward):
    made = reward(num_flow_updates=6, temperature=0.5).double()
    video = make_video(3, dtype=torch.float64).clamp(0.05, 0.95).requires_grad_()
    analytic, numeric = directional(lambda x: made(x, PROMPTS, **INFO), video)
    assert numeric.abs() > 1e-4
    torch.testing.assert_close(analytic, numeric, rtol=1e-4, atol=1e-8)


def test_torchvisions_own_gradient_is_another():
    """What `optical_flow` is for: there, each update's starting point is detached."""
    model, grads = tiny_raft(), []
    for flow in (lambda a, b: model(a, b, num_flow_updates=6)[-1], lambda a, b: optical_flow(model, a, b, 6)):
        pixels = flow_pixels(make_video()[0].transpose(0, 1), 32).requires_grad_()
        score = longest_flow(flow(pixels[:-1], pixels[1:])).sum()
        grads.append(torch.autograd.grad(score, pixels)[0])
    assert (grads[0] - grads[1]).norm() > 0.05 * grads[1].norm()


def test_a_video_that_stands_still_has_a_finite_gradient(reward):
    video = make_video(1).expand(-1, -1, 3, -1, -1).clone().requires_grad_()
    (grad,) = torch.autograd.grad(reward()(video, PROMPTS, **INFO).sum(), video)
    assert grad.isfinite().all()
    flow = torch.zeros(1, 2, 4, 4, requires_grad=True)
    assert torch.autograd.grad(longest_flow(flow).sum(), flow)[0].isfinite().all()


# ---------------------------------------- the contract


def test_the_probe_passes(reward):
    assert probe(reward(), (3, 5, 40, 36)).frames == 5


def test_batches_chunks_and_frames(reward):
    made, video = reward(temperature=0.5), make_video(5)
    whole = made(video, PROMPTS, **INFO)
    single = torch.cat([made(video[i : i + 1], PROMPTS[i : i + 1], **INFO) for i in range(2)])
    torch.testing.assert_close(single, whole, atol=1e-6, rtol=0)
    grads = []
    for settings in ({}, {"chunk": 3}):
        pixels = video.clone().requires_grad_()
        scores = reward(temperature=0.5, **settings)(pixels, PROMPTS, **INFO)
        torch.testing.assert_close(scores.detach(), whole, atol=1e-6, rtol=0)
        grads.append(torch.autograd.grad(scores.sum(), pixels)[0])
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(made(video, PROMPTS, fps=16), made(video[:, :, ::2], PROMPTS, fps=8), atol=1e-6, rtol=0)
    assert not any(module.training for module in made.train().modules())


def test_the_frame_rate_is_asked_for(reward):
    with pytest.raises(RewardError, match="'motion_degree': got no fps"):
        reward()(make_video(), PROMPTS)
    reward(num_frames=None)(make_video(), PROMPTS)


def test_an_image_and_sizes_that_do_not_fit_are_refused(reward):
    with pytest.raises(RewardError, match=r"got 1 frame\(s\); expected at least 2"):
        reward()(make_video(1), PROMPTS, **INFO)
    for size in (100, 24):
        with pytest.raises(RewardError, match=rf"got size={size}; expected a multiple of 8, at least 32"):
            reward(size=size)
    with torch.device("meta"), pytest.raises(RewardError, match="at least 128"):
        MotionDegree.random_init(size=64)


# ---------------------------------------- weights


def test_full_size_has_the_published_layout():
    with torch.device("meta"):
        model = MotionDegree.random_init().raft
    assert layout_of(model) == published_layout("torchvision_raft_large")
    published = Raft_Large_Weights.C_T_SKHT_V2
    assert sum(p.numel() for p in model.parameters()) == published.meta["num_params"]
    assert published.url == URL


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("rewards.common.weights._is_reachable", lambda endpoint: False)
    with pytest.raises(RewardError) as caught:
        load_reward("motion_degree")
    for part in [URL, "20.1 MB", "BSD-3-Clause", "`weights` in reward_kwargs.motion_degree", "local path"]:
        assert part in str(caught.value)
    with pytest.raises(RewardError, match="no file at absent.pth"):
        load_reward("motion_degree", weights="absent.pth")


def test_weights_from_a_file_and_from_torchs_cache(monkeypatch, tmp_path):
    torch.manual_seed(0)
    published, folder = raft_large(), tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(published.state_dict(), folder / URL.rsplit("/", 1)[1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for settings in ({}, {"weights": str(folder / URL.rsplit("/", 1)[1])}):
        loaded = load_reward("motion_degree", **settings).raft.state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in published.state_dict().items())
