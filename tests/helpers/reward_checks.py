"""What every reward model is held to: gradients as numbers, independence of the batch, chunks, and frozen layers."""

import torch
import torch.nn.functional as F

from rewards import probe

PROMPTS = ["a red kite flies", "two dogs run along a beach at sunset"]
PHOTOGRAPH_SIZES = [(480, 832), (832, 480), (256, 256), (720, 1280), (160, 288), (301, 203)]  # down, up, square, odd


def make_video(frames, height=48, width=64, batch=2, dtype=torch.float32, seed=0):
    """(B, 3, T, H, W) inside (0, 1): soft colours that move."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 3, 5, 5, generator=generator, dtype=dtype)
    return 0.05 + 0.9 * F.interpolate(coarse, size=(frames, height, width), mode="trilinear", align_corners=True)


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


def assert_gradient(reward, video, step=1e-4, rtol=1e-5, **info):
    """The directional derivative by autograd equals a central difference in float64, from pixels to score."""
    video = video.double().requires_grad_()
    direction = torch.randn(video.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    prompts = PROMPTS[: len(video)]
    (gradient,) = torch.autograd.grad(reward(video, prompts, **info).sum(), video)
    with torch.no_grad():
        ahead, behind = (reward(video + s * direction, prompts, **info).sum() for s in (step, -step))
    derivative = (ahead - behind) / (2 * step)
    assert derivative.abs() > 1e-5
    torch.testing.assert_close((gradient * direction).sum(), derivative, rtol=rtol, atol=1e-9)


def assert_batch_is_singles(reward, video, **info):
    """A batch scores as its videos one by one, to 1e-5."""
    singles = [reward(video[i : i + 1], PROMPTS[i : i + 1], **info) for i in range(len(video))]
    together = reward(video, PROMPTS[: len(video)], **info)
    torch.testing.assert_close(together, torch.cat(singles), atol=1e-5, rtol=1e-5)
    assert together.diff().abs().min() > 1e-4


def assert_chunks_change_nothing(make, video, chunk=1, **info):
    def scores_and_gradient(**settings):
        leaf = video.clone().requires_grad_()
        scores = make(**settings)(leaf, PROMPTS[: len(leaf)], **info)
        return scores.detach(), torch.autograd.grad(scores.sum(), leaf)[0]

    for whole, pieces in zip(scores_and_gradient(), scores_and_gradient(chunk=chunk), strict=True):
        torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-4)


def assert_contract(reward, shape=(3, 8, 48, 64)):
    """The probe passes; nothing trains, and evaluation mode holds."""
    report = probe(reward, shape)
    reward.train()
    assert not any(module.training for module in reward.modules())
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    return report


def assert_bfloat16_model_float32_score(make, video, **info):
    reward = make(dtype="bfloat16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = reward(video, PROMPTS[: len(video)], **info)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    exact = make(dtype="float32")(video, PROMPTS[: len(video)], **info)
    assert ((scores - exact).abs() / exact.abs().clamp(min=0.1)).max() < 0.2
