"""The video VAE of ContentV-nano: encoding in one pass, loss and training."""

import torch
from diffusers import AutoencoderKLWan
from train_loop import train

from rlhf.generator.wan_decoder import decode_unclamped
from rlhf.nano import world


def encode_whole(vae: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and log variance of all latents, as `vae.encode`, but in one pass."""

    def halve_frames(resample, inputs, out):
        # Without a cache diffusers skips the temporal convolution, which leaves out frame 0.
        return torch.cat([out[:, :, :1], resample.time_conv(out)], 2) if out.shape[2] > 1 else out

    downsamplers = (m for m in vae.encoder.modules() if getattr(m, "mode", "") == "downsample3d")
    hooks = [module.register_forward_hook(halve_frames) for module in downsamplers]
    try:
        mean, logvar = vae.quant_conv(vae.encoder(video)).chunk(2, dim=1)
    finally:
        for hook in hooks:
            hook.remove()
    return mean, logvar.clamp(-30, 20)


def vae_loss(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """Return the loss: L1 with more weight on shapes, L1 of edges, and a small KL term."""
    mean, logvar = encode_whole(vae, video)
    out = decode_unclamped(vae, mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
    weight = 1 + 4 * (video - video[..., :1, :1]).abs().amax(1, keepdim=True).clamp(max=1)
    edges = sum(((out - video).diff(dim=d)).abs().mean() for d in (-1, -2))
    kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
    return ((out - video).abs() * weight).mean() + 2 * edges + 5e-5 * kl


def train_vae(vae: AutoencoderKLWan, generator: torch.Generator, steps: dict[str, int]) -> None:
    """Train on single frames first, then on clips."""
    device, params, loss = generator.device, list(vae.parameters()), lambda v: vae_loss(vae, v)

    def images():
        clips = world.render(world.sample_scenes(128, generator), num_frames=5)
        pick = torch.randint(5, (128,), generator=generator, device=device)
        return (clips[torch.arange(128, device=device), :, pick].unsqueeze(2) * 2 - 1,)

    def clips():
        return (world.render(world.sample_scenes(32, generator)) * 2 - 1,)

    train("vae_image", steps["vae_image"], params, 1e-3, images, loss)
    train("vae_video", steps["vae_video"], params, 1e-3, clips, loss)


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, generator: torch.Generator) -> None:
    """Set mean and deviation of each latent channel, over 1,024 clips, in the VAE's config."""
    scenes = [world.sample_scenes(32, generator) for _ in range(32)]
    latents = torch.cat([encode_whole(vae, world.render(drawn) * 2 - 1)[0] for drawn in scenes])
    mean, std = latents.mean((0, 2, 3, 4)).tolist(), latents.std((0, 2, 3, 4)).tolist()
    vae.register_to_config(latents_mean=mean, latents_std=std)


def latent_scale(vae: AutoencoderKLWan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of the latents, (1, C, 1, 1, 1) each."""
    shape = lambda v: torch.tensor(v, device=device).view(1, -1, 1, 1, 1)
    return shape(vae.config.latents_mean), shape(vae.config.latents_std)


@torch.no_grad()
def reconstruct(
    vae: AutoencoderKLWan,
    video: torch.Tensor,
    noise: float | torch.Tensor = 0.0,
    other: torch.Tensor | None = None,
    share: float | torch.Tensor = 0.5,
) -> torch.Tensor:
    """Encode and decode video_BCTHW in [0, 1].

    noise is added to the unit-variance latents; a share of another video's latents is mixed in.
    """
    mean, std = latent_scale(vae, video.device)
    latents = encode_whole(vae, video * 2 - 1)[0]
    if other is not None:
        latents = torch.lerp(latents, encode_whole(vae, other * 2 - 1)[0], torch.as_tensor(share, device=video.device))
    return (decode_unclamped(vae, latents + noise * std * torch.randn_like(latents)) / 2 + 0.5).clamp(0, 1)
