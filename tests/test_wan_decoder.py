"""The functional decoder equals the VAE's own decode, forward and backward, for any chunk size."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny import tiny_vae

from rlhf.contentv.wan_decoder import decode_video

# The published statistics of Wan2.1's latents.
WAN_MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
WAN_MEAN += [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
WAN_STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
WAN_STD += [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]


def latents(frames=4, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 16, frames, 2, 3, generator=generator, dtype=dtype)


def stock_decode(vae, z):
    mean, std = (torch.tensor(v, dtype=z.dtype)[:, None, None, None] for v in (WAN_MEAN, WAN_STD))
    return (vae.decode(z * std + mean).sample + 1) / 2


def unsaturated_vae(dtype=torch.float64):
    """Pixels well inside (0, 1), where the stock clamp has a gradient too."""
    vae = tiny_vae().to(dtype)
    vae.decoder.conv_out.weight.mul_(0.02)
    vae.decoder.conv_out.bias.mul_(0.02)
    return vae


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 7])
def test_equals_stock_decode(frames, chunk):
    vae, z = tiny_vae(), latents(frames)
    video = decode_video(vae, z, chunk=chunk)
    assert video.shape == (2, 3, 4 * frames - 3, 16, 24)
    torch.testing.assert_close(video, stock_decode(vae, z), atol=1e-5, rtol=0)
    assert 0 <= video.min() < 0.3
    assert 0.7 < video.max() <= 1


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 7])
def test_equals_stock_decode_to_the_last_digits_in_float64(chunk):
    vae, z = tiny_vae().double(), latents(5, dtype=torch.float64)
    torch.testing.assert_close(decode_video(vae, z, chunk=chunk), stock_decode(vae, z), atol=1e-12, rtol=0)


@pytest.mark.parametrize("sizes", [{"temperal_downsample": [True, False, True]}, {"num_res_blocks": 2, "base_dim": 8}])
def test_equals_stock_decode_for_other_sizes(sizes):
    vae, z = tiny_vae(**sizes).double(), latents(3, dtype=torch.float64)
    torch.testing.assert_close(decode_video(vae, z, chunk=2), stock_decode(vae, z), atol=1e-12, rtol=0)


@pytest.mark.parametrize("num_frames", [1, 2, 5, 6, 13])
def test_leading_frames_are_those_of_the_whole_video(num_frames):
    vae, z = tiny_vae(), latents(4)
    whole = decode_video(vae, z)
    needed = 1 + -(-(num_frames - 1) // 4)
    z[:, :, needed:] = torch.nan  # not looked at
    torch.testing.assert_close(decode_video(vae, z, num_frames=num_frames), whole[:, :, :num_frames], atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradient_equals_autograd_through_stock_decode(chunk, checkpoint):
    vae = unsaturated_vae()
    weights = torch.randn(2, 3, 13, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    z, z_stock = (latents(dtype=torch.float64).requires_grad_() for _ in range(2))
    (stock_decode(vae, z_stock) * weights).sum().backward()
    (decode_video(vae, z, chunk=chunk, checkpoint=checkpoint) * weights).sum().backward()
    assert z.grad.abs().amax(dim=(0, 1, 3, 4)).min() > 1e-3  # every latent frame matters
    torch.testing.assert_close(z.grad, z_stock.grad, atol=1e-10, rtol=1e-10)


def test_gradient_of_the_first_frame_reaches_the_first_latent_only():
    z = latents(dtype=torch.float64).requires_grad_()
    decode_video(unsaturated_vae(), z, num_frames=1).sum().backward()
    assert z.grad[:, :, 0].abs().min() > 0
    assert z.grad[:, :, 1:].abs().max() == 0


@pytest.mark.parametrize(("chunk", "runs"), [(1, 4), (2, 2), (None, 1)])
def test_checkpoint_runs_each_chunk_again_in_backward(chunk, runs):
    vae, z = tiny_vae(), latents(4).requires_grad_()
    calls = []
    vae.decoder.conv_in.register_forward_pre_hook(lambda *_: calls.append(1))
    video = decode_video(vae, z, chunk=chunk, checkpoint=True)
    assert len(calls) == runs
    video.sum().backward()
    assert len(calls) == 2 * runs
    with torch.no_grad():
        decode_video(vae, z, chunk=chunk, checkpoint=True)
    assert len(calls) == 3 * runs


def test_a_saturated_pixel_still_has_a_gradient():
    vae = unsaturated_vae()
    z = latents(2, dtype=torch.float64).requires_grad_()
    decode_video(vae, z).sum().backward()
    inside = z.grad.clone()
    vae.decoder.conv_out.bias.add_(5)  # every pixel far above one
    z.grad = None
    video = decode_video(vae, z)
    assert (video == 1).all()
    video.sum().backward()
    torch.testing.assert_close(z.grad, inside)


def test_leaves_the_vae_alone():
    vae, z = tiny_vae(), latents(2)
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    expected = stock_decode(vae, z)
    caches = list(vae._feat_map)
    decode_video(vae, z, chunk=1)
    assert vae._feat_map == caches
    torch.testing.assert_close(stock_decode(vae, z), expected, atol=0, rtol=0)
    assert all(torch.equal(value, before[key]) for key, value in vae.state_dict().items())


def test_video_is_float32_whatever_the_vae():
    vae, z = tiny_vae(), latents(2)
    video = decode_video(vae.to(torch.bfloat16), z)
    assert video.dtype == torch.float32
    torch.testing.assert_close(video, decode_video(vae.float(), z), atol=0.1, rtol=0)


@pytest.mark.parametrize("num_frames", [0, 6, -1])
def test_frames_that_are_not_there_are_refused(num_frames):
    with pytest.raises(
        ValueError, match=rf"num_frames={num_frames}, expected 1 to 5 for 2 latent frames; ask for fewer"
    ):
        decode_video(tiny_vae(), latents(2), num_frames=num_frames)


def test_the_decoder_of_wan_2_2_is_refused():
    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True)
    with pytest.raises(ValueError, match="is_residual=True.*expected the Wan2.1 decoder"):
        decode_video(vae, latents(1))
