"""Train ContentV-nano and its judges from scratch: `python bench/nano/pretrain.py --output DIR`.

Stages, in order, on one GPU, with procedural clips (`rlhf.nano.world`):
  vae          AutoencoderKLWan, single frames first, then clips
  judges       verifier, CLIP of single frames, preference model; also on VAE reconstructions
  transformer  the denoiser and its text encoders by flow matching, on captions with some errors
  report       attribute accuracy of renders, reconstructions and samples; sample sheets
A second start on the same folder continues after the last finished stage. `--only judges` trains
verifier and preference model anew for the embedded VAE, and leaves everything else as it is.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import nano_models as parts
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from pretrain_judges import (
    JUDGE_POOL,
    ClipPool,
    random_wording,
    token_table,
    train_clip,
    train_preference,
    train_verifier,
)
from pretrain_vae import encode_whole, latent_scale, measure_latents, reconstruct, train_vae
from safetensors.torch import load_model, save_model
from torch import nn
from torchvision.utils import save_image
from train_loop import log, seconds, train

from rlhf.contentv.pipeline import ContentVPipeline
from rlhf.device import generator, pick_device
from rlhf.generator.files import SamplingDefaults
from rlhf.generator.loading import load_pipeline
from rlhf.io import write_json
from rlhf.nano import world
from rlhf.nano.judges import Preference, Verifier

STEPS = {"vae_image": 1050, "vae_video": 1950, "verifier": 5000}
STEPS |= {"clip": 3900, "preference": 4500, "transformer": 11_500}
CAPTION_NOISE = 0.25  # probability that an attribute of a training caption is wrong
POOL = 40_960  # clips whose latents the transformer is trained on


JUDGES = {"verifier": (Verifier, train_verifier), "preference": (Preference, train_preference)}


class Denoiser(nn.Module):
    """The transformer and its text encoders, trained together."""

    def __init__(self, tokenizers: dict):
        super().__init__()
        self.transformer = parts.build_transformer()
        self.encoders = nn.ModuleDict(parts.build_text_encoders(tokenizers))

    def embed(self, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return joint tokens (B, 2 L, D) and pooled (B, P) of token ids (B, L)."""
        names = "text_encoder", "text_encoder_2"
        first, second = (self.encoders[k](clip_ids, output_hidden_states=True) for k in names)
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        t5 = self.encoders["text_encoder_3"](t5_ids)[0]
        return torch.cat([clip, t5], -2), torch.cat([first[0], second[0]], -1)

    def forward(self, latents, sigma, clip_ids, t5_ids):
        """Return the velocity at noise level sigma (B,) in [0, 1]."""
        text, pooled = self.embed(clip_ids, t5_ids)
        return self.transformer(latents, text, pooled, sigma * 1000).sample


def miscaption(scenes: world.Scenes, generator: torch.Generator, chance: float) -> world.Scenes:
    """Return scenes whose judged attributes are redrawn, each with this probability.

    A scene that would become a held-out combination stays as it is.
    """
    count, device = len(scenes["color"]), scenes["color"].device
    seen = dict(scenes)
    for key in world.JUDGED:
        other = torch.randint(world.NUM_VALUES[key], (count,), generator=generator, device=device)
        slip = torch.rand(count, generator=generator, device=device) < chance
        seen[key] = torch.where(slip, other, scenes[key])
    held = world.is_held_out(seen)
    return {k: torch.where(held, scenes[k], seen[k]) for k in seen}


def train_transformer(
    ema_model: Denoiser, vae: AutoencoderKLWan, tokenizers: dict, generator: torch.Generator, steps: dict[str, int]
) -> None:
    """Train by flow matching (velocity = noise - data) at shifted logit-normal noise levels.

    ema_model gets the exponential moving average of the weights.
    """
    device, model = generator.device, copy.deepcopy(ema_model)
    sentences = [*parts.all_captions(), ""]  # the last is the empty prompt
    clip_table, t5_table = (token_table(tokenizers[k], sentences, device) for k in ("tokenizer", "tokenizer_3"))
    mean, std = latent_scale(vae, device)
    pool, scenes = _latent_pool(vae, mean, std, generator)
    shift = parts.build_scheduler().config.shift

    def batch(size=256):
        pick = torch.randint(POOL, (size,), generator=generator, device=device)
        seen = miscaption({k: v[pick] for k, v in scenes.items()}, generator, CAPTION_NOISE)
        rows = parts.caption_index(seen, random_wording(size, generator))
        rows[torch.rand(size, generator=generator, device=device) < 0.1] = len(clip_table) - 1
        u = torch.sigmoid(torch.randn(size, generator=generator, device=device))
        sigma = shift * u / (1 + (shift - 1) * u)
        noise = torch.randn(size, *pool.shape[1:], generator=generator, device=device)
        return pool[pick].float(), noise, sigma, clip_table[rows], t5_table[rows]

    def loss(data, noise, sigma, clip_ids, t5_ids):
        s = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False, enabled=device.type != "cpu"):
            velocity = model((1 - s) * data + s * noise, sigma, clip_ids, t5_ids)
        return F.mse_loss(velocity.float(), noise - data)

    ema = (list(ema_model.parameters()), list(model.parameters()))
    train("transformer", steps["transformer"], list(model.parameters()), 1e-3, batch, loss, ema)


@torch.no_grad()
def _latent_pool(
    vae: AutoencoderKLWan, mean: torch.Tensor, std: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, world.Scenes]:
    """Return normalised float16 latents of POOL clips, and their scenes."""
    pool, scenes = [], []
    for _ in range(0, POOL, 256):
        drawn = world.sample_scenes(256, generator)
        pool.append(((encode_whole(vae, world.render(drawn) * 2 - 1)[0] - mean) / std).half())
        scenes.append(drawn)
    log(stage="pool", clips=POOL)
    return torch.cat(pool), {k: torch.cat([s[k] for s in scenes]) for k in scenes[0]}


@torch.no_grad()
def accuracy(verifier: Verifier, video: torch.Tensor, wanted: world.Scenes) -> dict[str, float]:
    """Return the verifier's accuracy for the wanted attributes, one by one and all together."""
    right = torch.stack([verifier(video)[k].argmax(1) == wanted[k] for k in world.JUDGED], 1)
    values = dict(zip(world.JUDGED, right.float().mean(0).tolist(), strict=True))
    values["all"] = right.all(1).float().mean().item()
    return {k: round(v, 4) for k, v in values.items()}


def save_sheet(path: Path, video: torch.Tensor) -> None:
    """Write every fourth frame of each clip as a PNG, four clips in a row."""
    frames = video[:, :, ::4].transpose(1, 2).flatten(0, 1).cpu()
    save_image(frames, path, nrow=4 * len(range(0, video.shape[2], 4)))


def build_pipeline(vae: AutoencoderKLWan, denoiser: Denoiser, tokenizers: dict) -> ContentVPipeline:
    """Return the trained models as a pipeline."""
    models = {"transformer": denoiser.transformer, "vae": vae, **denoiser.encoders}
    pipe = ContentVPipeline(scheduler=parts.build_scheduler(), **models, **tokenizers)
    pipe.sampling = SamplingDefaults(**parts.SAMPLING)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def report(folder: Path, pipe: ContentVPipeline, verifier: Verifier, device: torch.device) -> dict:
    """Return the accuracy of renders, reconstructions and samples; write sample sheets."""
    scenes = world.sample_scenes(512, torch.Generator(device).manual_seed(1), held_out=True)
    real = world.render(scenes)
    rebuilt = torch.cat([reconstruct(pipe.vae, clips) for clips in real.split(128)])
    results = {"renders": accuracy(verifier, real, scenes), "reconstructions": accuracy(verifier, rebuilt, scenes)}
    save_sheet(folder / "reconstructions.png", torch.cat([real[:12], rebuilt[:12]]))
    default = pipe.sampling.guidance_scale
    sets = {"held_out": world.held_out_prompts(512), "train": world.train_prompts(512)}
    for guidance in (1.0, default, 4.5):
        for name, prompts in sets.items():
            sampling = pipe.sampling.call_arguments() | {"guidance_scale": guidance}
            noise = torch.Generator().manual_seed(0)
            video = pipe(prompts, generator=noise, output_type="pt", **sampling).frames.transpose(1, 2)
            read = [world.read_caption(prompt) for prompt in prompts]
            wanted = {k: torch.tensor([r[k] for r in read], device=device) for k in world.JUDGED}
            results[f"samples, {name}, guidance {guidance}"] = accuracy(verifier, video, wanted)
            if guidance == default and name == "held_out":
                save_sheet(folder / "samples.png", video[:24])
    return results


class Stages:
    """The trained models, each saved in `folder` when done, so that a second start can continue.

    Each has its own randomness from (seed, name), so it does not depend on the stages before it.
    """

    def __init__(self, folder: Path, device: torch.device, seed: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.device, self.seed = folder, device, seed

    def generator(self, name: str) -> torch.Generator:
        """Return the generator of a stage; seed the global one, too."""
        start = generator(self.seed, name).initial_seed()
        torch.manual_seed(start)
        return torch.Generator(self.device).manual_seed(start)

    def __call__(self, name: str, build: Callable[[], nn.Module], train_stage: Callable) -> nn.Module:
        """Return the module of `build`, trained by train_stage(module, generator) or loaded."""
        path, own = self.folder / f"{name}.safetensors", self.generator(name)
        module = build().to(self.device)
        if path.exists():
            load_model(module, path)
            log(stage=name, found=str(path))
        else:
            train_stage(module, own)
            save_model(module, str(path))
        return module.eval().requires_grad_(False)


def train_all(stages: Stages, steps: dict[str, int]) -> tuple:
    """Return VAE, denoiser, its tokenizers, verifier, CLIP, its tokenizer, and preference model."""
    vae = stages("vae", parts.build_vae, lambda model, own: train_vae(model, own, steps))
    measure_latents(vae, stages.generator("latents"))
    pool = ClipPool(vae, JUDGE_POOL, stages.generator("clips"))
    clip_tokenizer, tokenizers = parts.build_clip_tokenizer(), parts.build_tokenizers()
    verifier = stages("verifier", Verifier, lambda model, own: train_verifier(model, pool, own, steps))
    build_clip = lambda: parts.build_clip(clip_tokenizer)
    clip = stages("clip", build_clip, lambda model, own: train_clip(model, clip_tokenizer, pool, own, steps))
    preference = stages("preference", Preference, lambda model, own: train_preference(model, pool, own, steps))
    flow_matching = lambda model, own: train_transformer(model, vae, tokenizers, own, steps)
    denoiser = stages("transformer", lambda: Denoiser(tokenizers), flow_matching)
    return vae, denoiser, tokenizers, verifier, clip, clip_tokenizer, preference


def retrain_judges(stages: Stages, names: list[str], steps: dict[str, int]) -> None:
    """Train these judges for the embedded VAE, each on clips of its own, and write them."""
    vae = load_pipeline("nano", device=stages.device).vae.float()
    for name in names:
        pool = ClipPool(vae, JUDGE_POOL, stages.generator(f"clips of the {name}"))
        train_judge = lambda model, own, pool=pool, train=JUDGES[name][1]: train(model, pool, own, steps)
        parts.save_half(stages(name, JUDGES[name][0], train_judge), stages.folder.parent / f"{name}.safetensors")


def parse_pretrain_args() -> argparse.Namespace:
    """Return the command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights and the report")
    parser.add_argument("--device", default=None, help="kind of device (default: what the machine has)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all stages (default: 0)")
    parser.add_argument("--steps_scale", type=float, default=1.0, help="factor of all steps (default: 1)")
    only = ["judges", *JUDGES]
    parser.add_argument("--only", choices=only, help="train these judges for the embedded VAE (default: everything)")
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    args = parse_pretrain_args()
    device = pick_device(args.device)
    steps = {name: max(1, int(n * args.steps_scale)) for name, n in STEPS.items()}
    stages = Stages(args.output / "stages", device, args.seed)
    if args.only:
        return retrain_judges(stages, [*JUDGES] if args.only == "judges" else [args.only], steps)
    models = train_all(stages, steps)
    vae, denoiser, tokenizers, verifier, clip, clip_tokenizer, preference = models
    pipe = build_pipeline(vae, denoiser, tokenizers)
    results = report(args.output, pipe, verifier, device) | {"steps": steps, "seconds_of_last_start": seconds()}
    write_json(args.output / "report.json", results)
    log(**results)
    pipe.to(torch.float16).save_pretrained(args.output / "contentv-nano")
    parts.save_clip(clip, clip_tokenizer, args.output / "clip")
    parts.save_half(verifier, args.output / "verifier.safetensors")
    parts.save_half(preference, args.output / "preference.safetensors")


if __name__ == "__main__":
    main()
