"""Checks that hold for every reward model, as functions of `make(**options)`.

`every_check` is for rewards that score frames, `every_video_check` for those of whole videos.
"""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from rewards import RewardError, probe

PROMPTS = ["a red circle moves", "two dogs on a beach"]
PHOTOGRAPH_SIZES = [(480, 832), (832, 480), (256, 256), (720, 1280), (160, 288), (301, 203)]  # down, up, square, odd


def make_video(frames=3, height=40, width=36, batch=2, dtype=torch.float32):
    """(B, 3, T, H, W) inside (0, 1): smooth, with different frames."""
    coarse = torch.rand(batch, 3, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)
    video = F.interpolate(coarse, size=(max(frames, 3), height, width), mode="trilinear", align_corners=True)
    return 0.05 + 0.9 * video[:, :, :frames]


def as_is(size, batch=2):
    """One frame each, of the model's size and levels of 1/255: preprocessing only normalises."""
    return (make_video(1, size, size, batch) * 255).round() / 255


def to_pil(frames_NCHW):
    """Frames in [0, 1] as pictures."""
    return [Image.fromarray(x) for x in (frames_NCHW * 255).round().byte().permute(0, 2, 3, 1).numpy()]


def same(result, wanted, tolerance=1e-5):
    """Equal to `tolerance` of the scores' size (and of 1, for small ones)."""
    torch.testing.assert_close(result, wanted, atol=tolerance * max(1.0, wanted.abs().max().item()), rtol=0)


def photograph_and_noise(height, width):
    """Two uint8 images (3, H, W): soft shapes with edges, and noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 7, 9, generator=generator)
    soft = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)[0]
    soft[:, height // 3 : height // 2, width // 4 : width // 2] = 1
    noise = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return [(soft * 255).round().to(torch.uint8), noise]


def assert_grey_levels(difference):
    """difference, in units of 1/255 before normalisation: on average under .5, nowhere above 4."""
    assert difference.abs().mean() < 0.5
    assert difference.abs().max() <= 4


def assert_gradient(reward, video, step, rtol, least, **info):
    """The directional derivative by autograd equals a central difference in float64."""
    video = video.double().requires_grad_()
    direction = torch.randn(video.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = torch.tensor([1.0, -0.7], dtype=torch.float64)  # scores that both go up could cancel an error
    (gradient,) = torch.autograd.grad(reward(video, PROMPTS, **info) @ weight, video)
    with torch.no_grad():
        ahead, behind = (reward(video + s * direction, PROMPTS, **info) @ weight for s in (step, -step))
    derivative = (ahead - behind) / (2 * step)
    assert derivative.abs() > least
    torch.testing.assert_close((gradient * direction).sum(), derivative, rtol=rtol, atol=1e-9)


def assert_contract(reward, shape=(3, 8, 48, 64)):
    """The probe passes; nothing trains, and evaluation mode holds."""
    report = probe(reward, shape)
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    reward.train()
    assert not any(module.training for module in reward.modules())
    return report


def a_batch_equals_single_videos(make, video):
    reward = make()
    singles = [reward(video[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)]
    assert (singles[0] - singles[1]).abs() > 1e-4
    same(reward(video, PROMPTS), torch.cat(singles))


def chunks_change_nothing(make, video):
    def scores_and_gradient(chunk):
        leaf = video.clone().requires_grad_()
        scores = make(chunk=chunk)(leaf, PROMPTS)
        return scores.detach(), torch.autograd.grad(scores.sum(), leaf)[0]

    whole = scores_and_gradient(None)
    for chunk in (1, 4, 100):
        torch.testing.assert_close(scores_and_gradient(chunk), whole, atol=1e-5, rtol=1e-4)


def a_bfloat16_model_gives_float32_scores(make, video):
    reward = make(dtype="bfloat16")
    assert torch.bfloat16 in {parameter.dtype for parameter in reward.parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = reward(video, PROMPTS)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    same(scores, make(dtype="float32")(video, PROMPTS), 0.1)


def the_gradient_equals_finite_difference(make, video):
    assert_gradient(make(dtype="float64"), video, step=1e-4, rtol=1e-5, least=1e-5)


def the_contract_is_kept(make, video):
    assert_contract(make())


VIDEO_CHECKS = [
    a_batch_equals_single_videos,
    chunks_change_nothing,
    a_bfloat16_model_gives_float32_scores,
    the_gradient_equals_finite_difference,
    the_contract_is_kept,
]


def every_video_check(function):
    """Parametrise a test by `check`, a function of `make` and a video."""
    return pytest.mark.parametrize("check", VIDEO_CHECKS, ids=lambda check: check.__name__)(function)


# ---------------------------------------------------------------- rewards that score frames


def the_probe_passes(make):
    assert assert_contract(make(), (3, 4, 40, 36)).frames == 1


def the_gradient_from_all_frames_is_exact(make):
    assert_gradient(make(dtype="float64", frames="all"), make_video(2), step=1e-6, rtol=3e-6, least=1e-3)


def batches_chunks_and_dtypes(make):
    for check in (a_batch_equals_single_videos, chunks_change_nothing, a_bfloat16_model_gives_float32_scores):
        check(lambda **options: make(frames="all", **options), make_video())


def the_score_is_the_mean_over_evenly_spaced_frames(make):
    reward, video = make(), make_video(5)
    every = torch.stack([reward(video[:, :, i : i + 1], PROMPTS) for i in range(5)])
    assert every.diff(dim=0).abs().min() > 1e-5
    same(make(frames="all")(video, PROMPTS), every.mean(0))
    same(make(frames="all", num_frames=3)(video, PROMPTS), every[[0, 2, 4]].mean(0))


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
    the_gradient_from_all_frames_is_exact,
    batches_chunks_and_dtypes,
    the_score_is_the_mean_over_evenly_spaced_frames,
    autocast_does_not_reach_inside,
    evaluation_under_inference_mode_does_not_spoil_training,
    each_prompt_is_encoded_once,
    a_long_prompt_is_cut,
    wrong_options_are_named,
]


def every_check(function):
    """Parametrise a test by `check`, a function of `make`."""
    return pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)(function)
