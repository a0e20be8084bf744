"""The functional decoder equals the VAE's own decode, forward and backward, for any chunk size."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan
from kept import KeptBytes, counted_calls
from tiny import tiny_vae

from rlhf.execution.offload import HostMemory
from rlhf.generator import wan_decoder as module
from rlhf.generator.wan_decoder import decode_video, saturated_share, use_channels_last

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


@pytest.mark.parametrize(
    ("sizes", "chunks"),
    [
        ({}, [None, 1, 2, 3, 7]),
        ({"temperal_downsample": [True, False, True]}, [2]),
        ({"num_res_blocks": 2, "base_dim": 8}, [2]),
    ],
)
def test_equals_stock_decode_to_the_last_digits_in_float64(sizes, chunks):
    vae, z = tiny_vae(**sizes).double(), latents(5, dtype=torch.float64)
    expected = stock_decode(vae, z)
    for chunk in chunks:
        torch.testing.assert_close(decode_video(vae, z, chunk=chunk), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("num_frames", [1, 2, 5, 6, 13])
def test_leading_frames_are_those_of_the_whole_video(monkeypatch, num_frames):
    vae, z = tiny_vae(), latents(4)
    whole = decode_video(vae, z)
    needed = 1 + -(-(num_frames - 1) // 4)
    z[:, :, needed:] = torch.nan  # not looked at
    torch.testing.assert_close(decode_video(vae, z, num_frames=num_frames), whole[:, :, :num_frames], atol=1e-5, rtol=0)
    with counted_calls(monkeypatch, module, "_decode_chunk") as calls:
        decode_video(vae, z, num_frames=num_frames, chunk=1)
    assert len(calls) == needed


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
def test_checkpoint_runs_each_chunk_again_in_backward(monkeypatch, chunk, runs):
    vae, z = tiny_vae(), latents(4).requires_grad_()
    with counted_calls(monkeypatch, module, "_decode_chunk") as calls:
        video = decode_video(vae, z, chunk=chunk, checkpoint=True)
        assert len(calls) == runs
        video.sum().backward()
        assert len(calls) == 2 * runs
        with torch.no_grad():
            decode_video(vae, z, chunk=chunk, checkpoint=True)
        assert len(calls) == 3 * runs


def decode_gradient(vae, z, **how):
    z = z.clone().requires_grad_()
    video = decode_video(vae, z, **how)
    (video * torch.linspace(-1, 1, video.numel(), dtype=z.dtype).view_as(video)).sum().backward()
    return z.grad


@pytest.mark.parametrize("caches", [None, HostMemory("cpu", smallest_bytes=0)])
@pytest.mark.parametrize(("frames", "chunk"), [(5, 1), (9, 2), (1, 1)])
def test_every_place_for_the_caches_gives_the_same_gradient(caches, frames, chunk):
    vae, z = unsaturated_vae(), latents(frames, batch=1, dtype=torch.float64)
    found = decode_gradient(vae, z, chunk=chunk, checkpoint=True, caches=caches)
    torch.testing.assert_close(found, decode_gradient(vae, z), atol=1e-10, rtol=1e-10)


def test_a_decoder_that_is_trained_gets_its_gradient_from_pieces_too():
    vae, z = unsaturated_vae().requires_grad_(True), latents(2, batch=1, dtype=torch.float64)
    weights = vae.decoder.conv_in.weight, vae.decoder.conv_out.weight
    whole, pieces = (
        torch.autograd.grad(decode_video(vae, z, **how).square().sum(), weights)
        for how in ({}, {"chunk": 1, "checkpoint": True})
    )
    for found, expected in zip(pieces, whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("how", [{}, {"chunk": 1, "checkpoint": True}])
def test_in_float32_the_gradient_is_as_near_to_the_exact_one_as_that_of_stock_autograd(how):
    z, weights = latents(3), torch.randn(2, 3, 9, 16, 24, generator=torch.Generator().manual_seed(4))

    def gradient(decode, dtype):
        leaf = z.clone().to(dtype).requires_grad_()
        (decode(unsaturated_vae(torch.float32).to(dtype), leaf) * weights).sum().backward()
        return leaf.grad.double()

    exact = gradient(stock_decode, torch.float64)
    of_stock = (gradient(stock_decode, torch.float32) - exact).norm()
    ours = (gradient(lambda vae, z: decode_video(vae, z, **how), torch.float32) - exact).norm()
    assert ours < 2 * of_stock < 5e-5 * exact.norm()


def kept_bytes(vae, frames, **how):
    """Bytes kept after the decode, and at most during the backward pass, of batch 1."""
    z = latents(frames, batch=1).requires_grad_()
    with KeptBytes(vae) as kept:
        video = decode_video(vae, z, **how)
        held = kept.now
        video.sum().backward()
    return held, kept.most


def test_frozen_layers_keep_a_quarter_of_what_stock_autograd_keeps():
    vae, z = tiny_vae(), latents(4, batch=1).requires_grad_()
    with KeptBytes(vae) as kept:
        video = stock_decode(vae, z)
        stock = kept.now
    del video
    lean, _ = kept_bytes(vae, 4)
    assert 0 < lean < stock / 4
    vae.requires_grad_(True)
    trained, _ = kept_bytes(vae, 4)
    assert trained > 2 * lean, "a trained layer needs its input"


def test_one_chunk_is_held_at_a_time_and_caches_as_asked():
    vae, host = tiny_vae(), HostMemory("cpu", smallest_bytes=0)
    whole, _ = kept_bytes(vae, 9)
    kept = {caches: kept_bytes(vae, 9, chunk=1, checkpoint=True, caches=caches) for caches in (None, host)}
    held, most = kept[None]
    cache = held / 8  # the first of nine chunks has none
    assert whole > 4 * cache
    assert most < held + whole / 9 + 2 * cache
    assert kept[host][0] < 0.05 * cache
    assert kept[host][1] < whole / 9 + 2 * cache
    longer = kept_bytes(vae, 18, chunk=1, checkpoint=True, caches=host)
    assert longer[1] < 1.05 * kept[host][1], "however long the video is"


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize(("first", "last"), [(0, 5), (3, 9), (5, 5), (6, 13), (12, 13)])
def test_a_window_has_the_frames_of_the_whole_video(chunk, first, last):
    vae, z = tiny_vae().double(), latents(4, batch=1, dtype=torch.float64)
    whole = decode_video(vae, z)
    last = max(last, first + 1)
    window = decode_video(vae, z, num_frames=last, first_frame=first, chunk=chunk, checkpoint=True)
    torch.testing.assert_close(window, whole[:, :, first:last], atol=1e-12, rtol=0)


def test_the_window_alone_has_gradient_and_a_graph(monkeypatch):
    """Its gradient is the whole one but for the part through the caches, which are constants."""
    vae, z = unsaturated_vae(), latents(4, batch=1, dtype=torch.float64)
    with counted_calls(monkeypatch, module, "_decode_chunk") as calls:
        grad = decode_gradient(vae, z, first_frame=5, chunk=1, checkpoint=True)
    assert len(calls) == 2 + 2 * 2, "two latents once, two latents twice"
    assert grad[:, :, :2].abs().max() == 0
    assert grad[:, :, 2:].abs().amax((0, 1, 3, 4)).min() > 0

    def loss(last_two):
        with torch.no_grad():
            video = decode_video(vae, torch.cat([z[:, :, :2], last_two], 2), first_frame=5)
            return (video * torch.linspace(-1, 1, video.numel(), dtype=z.dtype).view_as(video)).sum().item()

    direction = torch.randn(z[:, :, 2:].shape, dtype=z.dtype, generator=torch.Generator().manual_seed(8))
    difference = loss(z[:, :, 2:] + 1e-3 * direction) - loss(z[:, :, 2:] - 1e-3 * direction)
    # The stock upsampler rounds to float32, which blurs differences of so small a step.
    assert difference / 2e-3 == pytest.approx((grad[:, :, 2:] * direction).sum().item(), rel=1e-3)


@pytest.mark.parametrize("how", [{}, {"chunk": 2, "checkpoint": True}])
def test_channels_last_changes_the_order_in_memory_alone(how):
    vae, z = unsaturated_vae(), latents(3, dtype=torch.float64)
    expected, expected_video = decode_gradient(vae, z, **how), decode_video(vae, z)
    use_channels_last(vae)
    assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(decode_video(vae, z), expected_video, atol=1e-12, rtol=0)
    torch.testing.assert_close(decode_gradient(vae, z, **how), expected, atol=1e-10, rtol=1e-10)


def test_the_saturated_share_counts_clamped_numbers():
    vae = unsaturated_vae()
    z = latents(2, dtype=torch.float64)
    assert saturated_share(decode_video(vae, z)).tolist() == [0, 0]
    vae.decoder.conv_out.bias[0] += 5  # all of the red
    torch.testing.assert_close(saturated_share(decode_video(vae, z)), torch.full((2,), 1 / 3))
    vae.decoder.conv_out.bias[0] -= 10
    torch.testing.assert_close(saturated_share(decode_video(vae, z)), torch.full((2,), 1 / 3))


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


def test_the_decoder_of_wan_2_2_is_refused():
    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True)
    with pytest.raises(ValueError, match="is_residual=True.*expected the Wan2.1 decoder"):
        decode_video(vae, latents(1))
    vae = SimpleNamespace(config=SimpleNamespace(is_residual=False, patch_size=2))
    with pytest.raises(ValueError, match="patch_size=2, expected the Wan2.1 decoder"):
        decode_video(vae, latents(1))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("num_frames", value, "1 to 5, .*; ask for fewer") for value in (0, 6, -1)),
        *(("first_frame", value, "0 to 4 for num_frames=5; correct") for value in (5, -1)),
    ],
)
def test_frames_that_are_not_there_are_refused(name, value, expected):
    with pytest.raises(ValueError, match=f"{name}={value}, expected {expected}"):
        decode_video(tiny_vae(), latents(2), **{name: value})
