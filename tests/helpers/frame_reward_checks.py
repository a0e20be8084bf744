"""What holds for every reward that scores frames, as functions of `make(**options)`, which builds a small one."""

import pytest
import torch
import torch.nn.functional as F

from rewards import RewardError, probe

PROMPTS = ["a red circle moves", "two dogs on a beach"]


def make_video(frames=3, height=40, width=36, batch=2, dtype=torch.float32):
    """Smooth and inside (0, 1), with different frames."""
    coarse = torch.rand(batch, 3, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)
    video = F.interpolate(coarse, size=(max(frames, 3), height, width), mode="trilinear", align_corners=True)
    return 0.05 + 0.9 * video[:, :, :frames]


def as_is(size, batch=2):
    """One frame each, of the model's own size and of levels of 1/255, so that preprocessing only normalises."""
    return (make_video(1, size, size, batch) * 255).round() / 255


def same(result, wanted, tolerance=1e-5):
    """Equal to `tolerance` of the scores' size (and of 1, for small ones)."""
    torch.testing.assert_close(result, wanted, atol=tolerance * max(1.0, wanted.abs().max().item()), rtol=0)


def the_probe_passes(make):
    assert probe(make(), (3, 4, 40, 36)).frames == 1


def the_gradient_equals_finite_difference(make):
    """Directional derivative in float64, from the pixels through resize, crop, clamp and model."""
    reward = make(dtype="float64", frames="all")
    video = make_video(2, dtype=torch.float64).requires_grad_()
    direction = torch.randn(video.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = torch.tensor([1.0, -0.7], dtype=torch.float64)  # scores that both go up could cancel an error
    (grad,) = torch.autograd.grad(reward(video, PROMPTS) @ weight, video)
    with torch.no_grad():
        ahead, behind = (reward(video + step * direction, PROMPTS) @ weight for step in (1e-6, -1e-6))
    derivative = (ahead - behind) / 2e-6
    assert derivative.abs() > 1e-3
    torch.testing.assert_close((grad * direction).sum(), derivative, rtol=3e-6, atol=1e-9)


def a_batch_equals_single_videos(make):
    reward, video = make(frames="all"), make_video()
    single = torch.cat([reward(video[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
    assert single.diff().abs() > 1e-3
    same(reward(video, PROMPTS), single)


def the_score_is_the_mean_over_evenly_spaced_frames(make):
    reward, video = make(), make_video(5)
    every = torch.stack([reward(video[:, :, i : i + 1], PROMPTS) for i in range(5)])
    assert every.diff(dim=0).abs().min() > 1e-5
    same(make(frames="all")(video, PROMPTS), every.mean(0))
    same(make(frames="all", num_frames=3)(video, PROMPTS), every[[0, 2, 4]].mean(0))


def chunks_change_nothing(make):
    def scores_and_gradient(chunk):
        video = make_video().requires_grad_()
        scores = make(frames="all", chunk=chunk)(video, PROMPTS)
        return scores.detach(), torch.autograd.grad(scores.sum(), video)[0]

    scores, gradient = scores_and_gradient(None)
    for chunk in (1, 4, 100):
        for result, wanted in zip(scores_and_gradient(chunk), (scores, gradient), strict=True):
            same(result, wanted)


def a_bfloat16_model_gives_float32_scores(make):
    video, reward = make_video(), make(dtype="bfloat16")
    scores, exact = reward(video, PROMPTS), make()(video, PROMPTS)
    assert torch.bfloat16 in {parameter.dtype for parameter in reward.parameters()}
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    same(scores, exact, 0.1)


def autocast_does_not_reach_inside(make):
    reward, video = make(), make_video()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = reward(video, PROMPTS)
    assert torch.equal(inside, reward(video, PROMPTS))


def evaluation_under_inference_mode_does_not_spoil_training(make):
    reward, video = make(), make_video(width=41)
    with torch.inference_mode():
        reward(video, PROMPTS)
    reward(video.requires_grad_(), PROMPTS).sum().backward()
    assert all(gradient.abs().sum() > 0 for gradient in video.grad)


def it_is_frozen_and_stays_in_evaluation_mode(make):
    reward = make()
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    reward.train()
    assert not any(module.training for module in reward.modules())


def each_prompt_is_encoded_once(make):
    reward, asked = make(), []
    encode = reward.encode_text
    reward.encode_text = lambda prompts: asked.extend(prompts) or encode(prompts)
    video = torch.cat([make_video(), make_video()])
    first, again = reward(video, PROMPTS + PROMPTS), reward(video, PROMPTS + PROMPTS)
    assert asked == PROMPTS
    assert torch.equal(first, again)


def a_long_prompt_is_cut(make):
    assert make()(make_video(), ["dog " * 200] * 2).isfinite().all()


def wrong_options_are_named(make):
    for options, part in [
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"chunk": 0}, "chunk=0"),
        ({"chunk": float("inf")}, "chunk=inf"),
        ({"num_frames": 4}, "frames='first'"),
    ]:
        with pytest.raises(RewardError, match=part):
            make(**options)


CHECKS = [
    the_probe_passes,
    the_gradient_equals_finite_difference,
    a_batch_equals_single_videos,
    the_score_is_the_mean_over_evenly_spaced_frames,
    chunks_change_nothing,
    a_bfloat16_model_gives_float32_scores,
    autocast_does_not_reach_inside,
    evaluation_under_inference_mode_does_not_spoil_training,
    it_is_frozen_and_stays_in_evaluation_mode,
    each_prompt_is_encoded_once,
    a_long_prompt_is_cut,
    wrong_options_are_named,
]


def every_check(function):
    """Parametrise a test by `check`, a function of `make`."""
    return pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)(function)
