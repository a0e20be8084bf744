"""Rebuild ContentV-nano and its judges from nothing, on one GPU: `python -m rlhf.nano.pretrain --output DIR`.

Stages, in order, each a plain training loop on procedural clips (`rlhf.nano.world`):
  vae          AutoencoderKLWan, single frames first, then clips
  judges       verifier, CLIP of single frames, preference model; they also see VAE reconstructions
  transformer  the denoiser and its three text encoders by flow matching, on captions of which a part is wrong
  report       attribute accuracy of renders, reconstructions and samples; sample sheets

At this size eager training is bound by kernel launches, so on CUDA each whole step is captured in a graph.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import nn
from torchvision.utils import save_image

from rlhf.contentv.pipeline import ContentVPipeline, SamplingDefaults
from rlhf.contentv.wan_decoder import _decode_chunks
from rlhf.device import pick_device
from rlhf.nano import judges, parts, world

STEPS = {"vae_image": 1050, "vae_video": 1950, "verifier": 3050, "clip": 3900, "preference": 1975, "transformer": 6500}
CAPTION_NOISE = 0.25  # chance that an attribute of a training caption is wrong
POOL = 40_960  # clips whose latents the transformer is trained on
JUDGE_POOL = 24_576  # clips that the judges are trained on, 0.2 MB each
STARTED = time.time()


def log(**values) -> None:
    print(json.dumps({"seconds": round(time.time() - STARTED)} | values), flush=True)


def train(name, steps, params, learning_rate, batch, loss_fn, ema=None, every=500, on_step=None):
    """AdamW with warm-up and linear decay. On CUDA, `batch()` is copied into fixed tensors and one graph is replayed.

    Args:
        batch: () -> tuple of tensors of fixed shapes.
        loss_fn: (*batch) -> scalar loss; must not read values back to the host.
        ema: (averaged parameters, live parameters), averaged at 0.997 per step.
        on_step: called with the step number after each step.
    """
    device = params[0].device
    rate = torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(
        params, lr=rate, weight_decay=0.01, betas=(0.9, 0.98), fused=device.type == "cuda", capturable=device.type == "cuda"
    )
    static = batch()

    def step():
        loss = loss_fn(*static)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimizer.step()
        if ema is not None:
            with torch.no_grad():
                torch._foreach_lerp_(ema[0], ema[1], 0.003)
        return loss.detach()

    replay = _capture(step, optimizer) if device.type == "cuda" else lambda: (optimizer.zero_grad(), step())[1]
    started = time.time()
    for i in range(steps):
        rate.fill_(learning_rate * min(1.0, (i + 1) / 200) * max(0.02, 1 - i / steps))
        for target, source in zip(static, batch(), strict=True):
            target.copy_(source)
        loss = replay()
        if i % every == 0 or i == steps - 1:
            log(stage=name, step=i, loss=round(loss.item(), 4), step_ms=round(1000 * (time.time() - started) / (i + 1), 1))
        if on_step:
            on_step(i + 1)


def _capture(step, optimizer):
    """Warm up on a side stream, then capture one whole step; returns () -> loss."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay():
        graph.replay()
        return loss

    return replay


# ------------------------------------------------------------------------------------------------------------------ VAE


def encode_whole(vae: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance of all latents in one pass; equal to `vae.encode`, which goes four frames at a time."""

    def halve_frames(resample, inputs, out):
        # With no cache the stock module leaves its temporal convolution out; the first frame never passes through it.
        return torch.cat([out[:, :, :1], resample.time_conv(out)], 2) if out.shape[2] > 1 else out

    hooks = [m.register_forward_hook(halve_frames) for m in vae.encoder.modules() if getattr(m, "mode", "") == "downsample3d"]
    try:
        mean, logvar = vae.quant_conv(vae.encoder(video)).chunk(2, dim=1)
    finally:
        for hook in hooks:
            hook.remove()
    return mean, logvar.clamp(-30, 20)


def decode_whole(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Raw latents to video in about [-1, 1], in one pass."""
    return _decode_chunks(vae, latents, latents.shape[2], False)


def vae_loss(vae, video):
    """L1 with the shapes weighted up, L1 of edges, and a light KL."""
    mean, logvar = encode_whole(vae, video)
    out = decode_whole(vae, mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
    weight = 1 + 4 * (video - video[..., :1, :1]).abs().amax(1, keepdim=True).clamp(max=1)
    edges = sum(((out - video).diff(dim=d)).abs().mean() for d in (-1, -2))
    kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
    return ((out - video).abs() * weight).mean() + 2 * edges + 5e-5 * kl


def train_vae(device, generator, steps) -> AutoencoderKLWan:
    vae = parts.build_vae().to(device)
    params, loss = list(vae.parameters()), lambda v: vae_loss(vae, v)

    def images():
        clips = world.render(world.sample_scenes(128, generator), num_frames=5)
        pick = torch.randint(5, (128,), generator=generator, device=device)
        return (clips[torch.arange(128, device=device), :, pick].unsqueeze(2) * 2 - 1,)

    def clips():
        return (world.render(world.sample_scenes(32, generator)) * 2 - 1,)

    train("vae_image", steps["vae_image"], params, 1e-3, images, loss)
    train("vae_video", steps["vae_video"], params, 1e-3, clips, loss)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat([encode_whole(vae, clips()[0])[0] for _ in range(32)])
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist()
    )
    return vae


def latent_scale(vae, device) -> tuple[torch.Tensor, torch.Tensor]:
    shape = lambda v: torch.tensor(v, device=device).view(1, -1, 1, 1, 1)
    return shape(vae.config.latents_mean), shape(vae.config.latents_std)


@torch.no_grad()
def reconstruct(vae, video, noise: float | torch.Tensor = 0.0):
    """video_BCTHW in [0, 1] through the VAE; noise is added to its unit-variance latents."""
    mean, std = latent_scale(vae, video.device)
    latents = encode_whole(vae, video * 2 - 1)[0]
    return (decode_whole(vae, latents + noise * std * torch.randn_like(latents)) / 2 + 0.5).clamp(0, 1)


# --------------------------------------------------------------------------------------------------------------- judges


class ClipPool:
    """Clips to train judges on, kept as bytes: half of them through the VAE with some latent noise.

    A judge must not be misled by what a decoder does to a clip. The first `BAD` clips also have a version with so much
    latent noise that nobody would want it.
    """

    BAD = 4096

    def __init__(self, vae, size, generator):
        self.scenes = world.sample_scenes(size, generator, held_out=None)
        self.trainable = (~world.is_held_out(self.scenes)).nonzero()[:, 0]
        device, parts_of = generator.device, torch.arange(size, device=generator.device).split(128)
        noise = 0.6 * torch.rand(size, 1, 1, 1, 1, generator=generator, device=device)
        self.video, self.bad = [], []
        for i in parts_of:
            video = world.render({k: v[i] for k, v in self.scenes.items()})
            self.video.append(_to_bytes(torch.cat([reconstruct(vae, video[::2], noise[i[::2]]), video[1::2]])))
            if i[0] < self.BAD:
                self.bad.append(_to_bytes(reconstruct(vae, video, 1.5)))
        order = torch.cat([torch.cat([i[::2], i[1::2]]) for i in parts_of])
        self.video = torch.cat(self.video)[order.argsort()]
        self.bad = torch.cat(self.bad)
        log(stage="clip pool", clips=size)

    def draw(self, count, generator, held_out=False):
        """Positions, scenes and clips with a little pixel noise; without `held_out`, training combinations only."""
        among = torch.arange(len(self.video), device=self.video.device) if held_out else self.trainable
        pick = among[torch.randint(len(among), (count,), generator=generator, device=among.device)]
        video = self.video[pick].float() / 255
        strength = 0.1 * torch.rand(count, 1, 1, 1, 1, generator=generator, device=video.device)
        return pick, {k: v[pick] for k, v in self.scenes.items()}, (video + strength * torch.randn_like(video)).clamp(0, 1)


def _to_bytes(video):
    return (video * 255).round().to(torch.uint8)


def degraded(pool, pick, video, generator):
    """Clips that a person would like less: latent noise, blur, washed out, shuffled in time, grainy, badly drawn."""
    chunks = list(video.clone().chunk(8))
    bad = pool.bad[pick[: len(chunks[0])] % pool.BAD].float() / 255
    chunks[0] = torch.where((pick[: len(bad)] < pool.BAD).view(-1, 1, 1, 1, 1), bad, torch.randn_like(bad) * 0.2 + 0.5)
    B, _, T, H, W = chunks[1].shape
    small = F.interpolate(chunks[1].flatten(1, 2), scale_factor=0.15, mode="bilinear", antialias=True)
    chunks[1] = F.interpolate(small, (H, W), mode="bilinear").view(B, 3, T, H, W)
    chunks[2] = chunks[2] * 0.4 + 0.3
    chunks[3] = chunks[3][:, :, torch.randperm(T, generator=generator, device=video.device)]
    chunks[4] = (chunks[4] + 0.35 * torch.randn_like(chunks[4])).clamp(0, 1)
    melted = torch.cat([pick.chunk(8)[i] for i in (5, 6, 7)])
    other = torch.randint(len(world.SHAPES) - 1, (len(melted),), generator=generator, device=video.device) + 1
    scenes = {k: v[melted] for k, v in pool.scenes.items()}
    amount = 0.3 + 0.4 * torch.rand(len(melted), generator=generator, device=video.device)
    drawn = world.render(scenes, melt=((scenes["shape"] + other) % len(world.SHAPES), amount))
    return torch.cat([*chunks[:5], (drawn + 0.05 * torch.randn_like(drawn)).clamp(0, 1)])


def with_one_wrong(scenes, generator):
    """The same scenes with one judged attribute changed to another value."""
    count, device = len(scenes["color"]), scenes["color"].device
    which = torch.randint(len(world.JUDGED), (count,), generator=generator, device=device)
    wrong = dict(scenes)
    for i, key in enumerate(world.JUDGED):
        n = world.NUM_VALUES[key]
        other = (scenes[key] + torch.randint(1, n, (count,), generator=generator, device=device)) % n
        wrong[key] = torch.where(which == i, other, scenes[key])
    return wrong


def random_wording(count, generator):
    return torch.randint(2 * len(world.SENTENCES), (count,), generator=generator, device=generator.device)


def train_verifier(pool, device, generator, steps) -> judges.Verifier:
    verifier = judges.Verifier().to(device)

    def batch():
        _, scenes, video = pool.draw(128, generator, held_out=True)
        return video, *(scenes[k] for k in world.JUDGED)

    def loss(video, *targets):
        logits = verifier(video)
        return sum(F.cross_entropy(logits[k], t) for k, t in zip(world.JUDGED, targets, strict=True))

    train("verifier", steps["verifier"], list(verifier.parameters()), 2e-3, batch, loss)
    return verifier.eval().requires_grad_(False)


def contrastive(a, b, scale):
    logits, target = a @ b.T * scale, torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_clip(pool, device, generator, steps):
    import open_clip

    clip = parts.build_clip().to(device)
    table = open_clip.SimpleTokenizer(context_length=parts.MAX_TOKENS)(parts.all_captions()).to(device)
    used = torch.zeros(parts.CLIP_CONFIG["text_cfg"]["vocab_size"], 1, device=device)
    used[table.unique()] = 1
    clip.token_embedding.weight.data *= used  # rows that no sentence trains stay zero
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))

    def batch():
        _, scenes, clips = pool.draw(256, generator)
        moment = torch.randint(clips.shape[2], (256,), generator=generator, device=device)
        frames = clips[torch.arange(256, device=device), :, moment]
        wording = random_wording(256, generator)
        wrong = with_one_wrong(scenes, generator)
        return (frames - mean) / std, table[parts.caption_index(scenes, wording)], table[parts.caption_index(wrong, wording)]

    def loss(frames, ids, wrong_ids):
        image = clip.encode_image(frames, normalize=True)
        text, wrong = clip.encode_text(torch.cat([ids, wrong_ids]), normalize=True).chunk(2)
        scale = clip.logit_scale.exp()
        margin = scale * ((image * text).sum(-1) - (image * wrong).sum(-1))
        return contrastive(image, text, scale) - F.logsigmoid(margin).mean()

    train("clip", steps["clip"], list(clip.parameters()), 1e-3, batch, loss)
    return clip.eval().requires_grad_(False)


def train_preference(pool, device, generator, steps) -> judges.Preference:
    """Bradley-Terry on pairs nobody had to label: clean over degraded, rightly over wrongly captioned."""
    model = judges.Preference().to(device)
    table = judges.word_ids(parts.all_captions()).to(device)

    def batch():
        pick, scenes, clean = pool.draw(160, generator)
        wording = random_wording(160, generator)
        wrong = with_one_wrong(scenes, generator)
        return (
            clean,
            degraded(pool, pick, clean, generator),
            table[parts.caption_index(scenes, wording)],
            table[parts.caption_index(wrong, wording)],
        )

    def loss(clean, bad, ids, wrong_ids):
        good, worse = model.embed_video(torch.cat([clean, bad])).chunk(2)
        text, wrong = model.embed_words(torch.cat([ids, wrong_ids])).chunk(2)
        scale, score = model.log_scale.exp(), lambda v, w: (v * w).sum(-1)
        over_degraded = F.logsigmoid(scale * (score(good, text) - score(worse, text))).mean()
        over_miscaptioned = F.logsigmoid(scale * (score(good, text) - score(good, wrong))).mean()
        return contrastive(good, text, scale) - over_degraded - over_miscaptioned

    train("preference", steps["preference"], list(model.parameters()), 1e-3, batch, loss)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------- transformer


class Denoiser(nn.Module):
    """The transformer with its text encoders, trained together; what `ContentVPipeline` does with token ids."""

    def __init__(self, tokenizers):
        super().__init__()
        self.transformer = parts.build_transformer()
        self.encoders = nn.ModuleDict(parts.build_text_encoders(tokenizers))

    def embed(self, clip_ids, t5_ids):
        """Token ids (B, L) -> joint tokens (B, 2 L, D) and pooled (B, P), as `StableDiffusion3Pipeline.encode_prompt`."""
        first, second = (self.encoders[k](clip_ids, output_hidden_states=True) for k in ("text_encoder", "text_encoder_2"))
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        t5 = self.encoders["text_encoder_3"](t5_ids)[0]
        return torch.cat([clip, t5], -2), torch.cat([first[0], second[0]], -1)

    def forward(self, latents, sigma, clip_ids, t5_ids):
        text, pooled = self.embed(clip_ids, t5_ids)
        return self.transformer(latents, text, pooled, sigma * 1000).sample


def miscaption(scenes, generator, chance):
    """Scenes as a careless captioner saw them: each judged attribute wrong with this chance, held-out ones avoided."""
    count, device = len(scenes["color"]), scenes["color"].device
    seen = dict(scenes)
    for key in world.JUDGED:
        other = torch.randint(world.NUM_VALUES[key], (count,), generator=generator, device=device)
        slip = torch.rand(count, generator=generator, device=device) < chance
        seen[key] = torch.where(slip, other, scenes[key])
    held = world.is_held_out(seen)
    return {k: torch.where(held, scenes[k], seen[k]) for k in seen}


def token_tables(tokenizers, device):
    """Token ids of every sentence of the world, and in the last row those of the empty prompt."""
    sentences = [*parts.all_captions(), ""]
    encode = lambda t: t(sentences, padding="max_length", max_length=parts.MAX_TOKENS, truncation=True, return_tensors="pt")
    return encode(tokenizers["tokenizer"]).input_ids.to(device), encode(tokenizers["tokenizer_3"]).input_ids.to(device)


def train_transformer(vae, tokenizers, device, generator, steps, keep=()):
    """Flow matching (velocity noise - data) with logit-normal noise levels, shifted as the sampler is.

    Returns the averaged weights at the end and, for each step count in `keep`, a copy at that step.
    """
    model = Denoiser(tokenizers).to(device)
    averaged = copy.deepcopy(model)
    clip_table, t5_table = token_tables(tokenizers, device)
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
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False, enabled=device.type == "cuda"):
            velocity = model((1 - s) * data + s * noise, sigma, clip_ids, t5_ids)
        return F.mse_loss(velocity.float(), noise - data)

    snapshots = {}

    def snapshot(step):
        if step in keep:
            snapshots[step] = copy.deepcopy(averaged).eval()

    ema = (list(averaged.parameters()), list(model.parameters()))
    train("transformer", steps["transformer"], list(model.parameters()), 1e-3, batch, loss, ema, on_step=snapshot)
    return averaged.eval().requires_grad_(False), snapshots


@torch.no_grad()
def _latent_pool(vae, mean, std, generator):
    pool, scenes = [], []
    for _ in range(0, POOL, 256):
        drawn = world.sample_scenes(256, generator)
        pool.append(((encode_whole(vae, world.render(drawn) * 2 - 1)[0] - mean) / std).half())
        scenes.append(drawn)
    log(stage="pool", clips=POOL)
    return torch.cat(pool), {k: torch.cat([s[k] for s in scenes]) for k in scenes[0]}


# --------------------------------------------------------------------------------------------------------------- report


@torch.no_grad()
def sample(model, vae, prompts, tokenizers, device, seed=0, steps=None, guidance=None):
    """Videos of the prompts by the pipeline's own Euler steps, adapter-free, all in one batch."""
    steps, guidance = steps or parts.SAMPLING["num_inference_steps"], guidance or parts.SAMPLING["guidance_scale"]
    ids = [
        tokenizers[k](prompts + [""], padding="max_length", max_length=parts.MAX_TOKENS, truncation=True, return_tensors="pt")
        .input_ids.to(device)
        for k in ("tokenizer", "tokenizer_3")
    ]
    text, pooled = model.embed(*ids)
    count = len(prompts)
    empty, empty_pooled = text[-1:].expand(count, -1, -1), pooled[-1:].expand(count, -1)
    x = torch.randn(count, 16, 5, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)
    scheduler = parts.build_scheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist(), device=device)
    for sigma, following in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        t = (sigma * 1000).expand(count)
        v = model.transformer(x, text[:-1], pooled[:-1], t).sample
        if guidance > 1:
            base = model.transformer(x, empty, empty_pooled, t).sample
            v = base + guidance * (v - base)
        x = x + (following - sigma) * v
    mean, std = latent_scale(vae, device)
    return (decode_whole(vae, x * std + mean) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def accuracy(verifier, video, wanted) -> dict[str, float]:
    """Share of clips whose attributes the verifier reads as wanted, each and all together."""
    right = torch.stack([verifier(video)[k].argmax(1) == wanted[k] for k in world.JUDGED], 1)
    values = dict(zip(world.JUDGED, right.float().mean(0).tolist(), strict=True)) | {"all": right.all(1).float().mean().item()}
    return {k: round(v, 4) for k, v in values.items()}


def wanted_of(prompts, device):
    read = [world.read_caption(p) for p in prompts]
    return {k: torch.tensor([r[k] for r in read], device=device) for k in world.JUDGED}


def save_model(folder: Path, vae, denoiser, tokenizers) -> None:
    """A checkpoint in diffusers layout, float16: what `load_pipeline` reads."""
    pipe = ContentVPipeline(
        transformer=denoiser.transformer,
        vae=vae,
        scheduler=parts.build_scheduler(),
        **denoiser.encoders,
        **tokenizers,
    )
    pipe.sampling = SamplingDefaults(**parts.SAMPLING)
    pipe.to(torch.float16).save_pretrained(folder)


def save_judges(folder: Path, verifier, clip, preference) -> None:
    parts.save_clip(clip, folder / "clip")
    for name, model in (("verifier", verifier), ("preference", preference)):
        save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, folder / f"{name}.safetensors")


def sheet(path: Path, video: torch.Tensor, columns: int = 4) -> None:
    """Every fourth frame of each clip, `columns` clips in a row, as a PNG."""
    frames = video[:, :, ::4].transpose(1, 2).flatten(0, 1).cpu()
    save_image(frames, path, nrow=columns * len(range(0, video.shape[2], 4)))


@torch.no_grad()
def report(folder: Path, vae, denoiser, tokenizers, verifier, device) -> dict:
    """Accuracy by the verifier of held-out renders, of their reconstructions and of samples; sheets of both."""
    scenes = world.sample_scenes(512, torch.Generator(device).manual_seed(1), held_out=True)
    real = world.render(scenes)
    rebuilt = torch.cat([reconstruct(vae, clips) for clips in real.split(128)])
    results = {"renders": accuracy(verifier, real, scenes), "reconstructions": accuracy(verifier, rebuilt, scenes)}
    sheet(folder / "reconstructions.png", torch.cat([real[:12], rebuilt[:12]]))
    for guidance in (1.0, 2.0, 3.0, 4.5):
        for name, prompts in (("held_out", world.held_out_prompts(512)), ("train", world.train_prompts(512))):
            video = sample(denoiser, vae, prompts, tokenizers, device, guidance=guidance)
            results[f"samples, {name}, guidance {guidance}"] = accuracy(verifier, video, wanted_of(prompts, device))
            if guidance == parts.SAMPLING["guidance_scale"] and name == "held_out":
                sheet(folder / "samples.png", video[:24])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a new folder for the weights and the report")
    parser.add_argument("--device", default=None, help="default: the accelerator of this machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps_scale", type=float, default=1.0, help="multiplies the steps of every stage")
    args = parser.parse_args()
    device = pick_device(args.device)
    steps = {name: max(1, int(n * args.steps_scale)) for name, n in STEPS.items()}
    args.output.mkdir(parents=True)

    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    vae = train_vae(device, generator, steps)
    pool = ClipPool(vae, JUDGE_POOL, generator)
    verifier = train_verifier(pool, device, generator, steps)
    clip = train_clip(pool, device, generator, steps)
    preference = train_preference(pool, device, generator, steps)
    del pool
    tokenizers = parts.build_tokenizers()
    denoiser = train_transformer(vae, tokenizers, device, generator, steps)
    results = report(args.output, vae, denoiser, tokenizers, verifier, device)
    save_model(args.output / "contentv-nano", vae, denoiser, tokenizers)
    save_judges(args.output, verifier, clip, preference)
    results |= {"steps": steps, "seconds": round(time.time() - STARTED)}
    (args.output / "report.json").write_text(json.dumps(results, indent=2) + "\n")
    log(**results)


if __name__ == "__main__":
    main()
