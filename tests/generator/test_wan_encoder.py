"""Encoding is the inverse of decoding, up to what the VAE loses."""

import torch
from tiny import tiny_vae

from rlhf.generator.loading import load_pipeline
from rlhf.generator.wan_decoder import decode_video, unnormalise
from rlhf.generator.wan_encoder import encode_video
from rlhf.nano import world


def test_latents_are_the_posteriors_mean_on_the_transformers_scale():
    vae = tiny_vae()
    video = torch.rand(2, 3, 5, 16, 32, generator=torch.Generator().manual_seed(0))
    latents = encode_video(vae, video)
    posterior = vae.encode(video * 2 - 1).latent_dist
    assert posterior.std.mean() > 1e-3, "a sample would be another"
    torch.testing.assert_close(unnormalise(vae, latents), posterior.mode(), rtol=1e-5, atol=1e-6)
    expected = vae.decode(posterior.mode()).sample.clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(decode_video(vae, latents), expected, rtol=1e-4, atol=1e-5)


def test_nanos_own_videos_come_back_from_its_latents():
    """To the VAE's own error; on the wrong scale of latents it is many times as large."""
    vae = load_pipeline("nano").vae
    clips = world.render(world.sample_scenes(2, torch.Generator().manual_seed(0)), num_frames=5)
    own = decode_video(vae, encode_video(vae, clips))
    latents = encode_video(vae, own)
    lost = (decode_video(vae, latents) - own).abs().mean()
    assert lost < 0.01
    assert (decode_video(vae, unnormalise(vae, latents)) - own).abs().mean() > 5 * lost
    assert 0.7 < latents.std() < 1.3
