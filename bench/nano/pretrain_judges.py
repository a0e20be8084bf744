"""Training of ContentV-nano's judges: verifier, CLIP of frames, preference model."""

import nano_models as parts
import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from pretrain_vae import reconstruct
from train_loop import log, train
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from rlhf.nano import judges, world

JUDGE_POOL = 24_576  # clips, 0.2 MB each


class ClipPool:
    """Training clips as bytes, half of them reconstructed by the VAE with some latent noise.

    So the judges learn to ignore the decoder's traces. The first `BAD` clips also have a version
    with very much latent noise.
    """

    BAD = 4096

    def __init__(self, vae: AutoencoderKLWan, size: int, generator: torch.Generator):
        self.scenes = world.sample_scenes(size, generator, held_out=None)
        self.trainable = (~world.is_held_out(self.scenes)).nonzero()[:, 0]
        device, batches = generator.device, torch.arange(size, device=generator.device).split(128)
        noise = 0.6 * torch.rand(size, 1, 1, 1, 1, generator=generator, device=device)
        self.video, self.bad = [], []
        for i in batches:
            video = world.render({k: v[i] for k, v in self.scenes.items()})
            self.video.append(_to_bytes(torch.cat([reconstruct(vae, video[::2], noise[i[::2]]), video[1::2]])))
            if i[0] < self.BAD:
                self.bad.append(_to_bytes(reconstruct(vae, video, 1.5)))
        order = torch.cat([torch.cat([i[::2], i[1::2]]) for i in batches])
        self.video = torch.cat(self.video)[order.argsort()]
        self.bad = torch.cat(self.bad)
        log(stage="clip pool", clips=size)

    def draw(
        self, count: int, generator: torch.Generator, held_out: bool = False
    ) -> tuple[torch.Tensor, world.Scenes, torch.Tensor]:
        """Return positions, scenes and clips with a little pixel noise.

        held_out: draw held-out combinations, too, not training combinations only.
        """
        among = torch.arange(len(self.video), device=self.video.device) if held_out else self.trainable
        pick = among[torch.randint(len(among), (count,), generator=generator, device=among.device)]
        video = self.video[pick].float() / 255
        strength = 0.1 * torch.rand(count, 1, 1, 1, 1, generator=generator, device=video.device)
        scenes = {k: v[pick] for k, v in self.scenes.items()}
        return pick, scenes, (video + strength * torch.randn_like(video)).clamp(0, 1)


def _to_bytes(video):
    return (video * 255).round().to(torch.uint8)


def degrade(pool: ClipPool, pick: torch.Tensor, video: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return worse clips: latent noise, blur, low contrast, shuffled, grain, bad outlines."""
    chunks = list(video.clone().chunk(8))
    bad = pool.bad[pick[: len(chunks[0])] % pool.BAD].float() / 255
    has_bad = (pick[: len(bad)] < pool.BAD).view(-1, 1, 1, 1, 1)
    chunks[0] = torch.where(has_bad, bad, torch.randn_like(bad) * 0.2 + 0.5)
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


def corrupt_one_attribute(scenes: world.Scenes, generator: torch.Generator) -> world.Scenes:
    """Return the scenes with one judged attribute of each changed to another value."""
    count, device = len(scenes["color"]), scenes["color"].device
    which = torch.randint(len(world.JUDGED), (count,), generator=generator, device=device)
    wrong = dict(scenes)
    for i, key in enumerate(world.JUDGED):
        n = world.NUM_VALUES[key]
        other = (scenes[key] + torch.randint(1, n, (count,), generator=generator, device=device)) % n
        wrong[key] = torch.where(which == i, other, scenes[key])
    return wrong


def random_wording(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return wordings for `caption_index`, (count,)."""
    return torch.randint(2 * len(world.SENTENCES), (count,), generator=generator, device=generator.device)


def caption_pairs(
    table: torch.Tensor, scenes: world.Scenes, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids of each scene's caption, and of that with one wrong attribute."""
    wording = random_wording(len(scenes["color"]), generator)
    wrong = corrupt_one_attribute(scenes, generator)
    return tuple(table[parts.caption_index(captioned, wording)] for captioned in (scenes, wrong))


def train_verifier(
    verifier: judges.Verifier, pool: ClipPool, generator: torch.Generator, steps: dict[str, int]
) -> None:
    """Train by cross-entropy on every judged attribute."""

    def batch():
        _, scenes, video = pool.draw(128, generator, held_out=True)
        return video, *(scenes[k] for k in world.JUDGED)

    def loss(video, *targets):
        logits = verifier(video)
        return sum(F.cross_entropy(logits[k], t) for k, t in zip(world.JUDGED, targets, strict=True))

    train("verifier", steps["verifier"], list(verifier.parameters()), 2e-3, batch, loss)


def contrastive(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return CLIP's symmetric cross-entropy of pairs (B, D); scale multiplies the cosines."""
    logits, target = a @ b.T * scale, torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_clip(
    clip: open_clip.CLIP,
    tokenizer: CLIPTokenizer,
    pool: ClipPool,
    generator: torch.Generator,
    steps: dict[str, int],
) -> None:
    """Train by CLIP's loss, and by each frame's caption against one with a wrong attribute."""
    device = generator.device
    table = token_table(tokenizer, parts.all_captions(), device)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (parts.CLIP_MEAN, parts.CLIP_STD))

    def batch():
        _, scenes, clips = pool.draw(256, generator)
        moment = torch.randint(clips.shape[2], (256,), generator=generator, device=device)
        frames = clips[torch.arange(256, device=device), :, moment]
        return (frames - mean) / std, *caption_pairs(table, scenes, generator)

    def loss(frames, ids, wrong_ids):
        image = clip.encode_image(frames, normalize=True)
        text, wrong = clip.encode_text(torch.cat([ids, wrong_ids]), normalize=True).chunk(2)
        scale = clip.logit_scale.exp()
        margin = scale * ((image * text).sum(-1) - (image * wrong).sum(-1))
        return contrastive(image, text, scale) - F.logsigmoid(margin).mean()

    train("clip", steps["clip"], list(clip.parameters()), 1e-3, batch, loss)


def train_preference(
    model: judges.Preference, pool: ClipPool, generator: torch.Generator, steps: dict[str, int]
) -> None:
    """Train by Bradley-Terry on pairs: clean over degraded, correct over wrong captions."""
    table = judges.word_ids(parts.all_captions()).to(generator.device)

    def batch():
        pick, scenes, clean = pool.draw(160, generator)
        ids = caption_pairs(table, scenes, generator)
        return clean, degrade(pool, pick, clean, generator), *ids

    def loss(clean, bad, ids, wrong_ids):
        good, worse = model.embed_video(torch.cat([clean, bad])).chunk(2)
        text, wrong = model.embed_words(torch.cat([ids, wrong_ids])).chunk(2)
        scale, cosine = model.log_scale.exp(), lambda v, w: (v * w).sum(-1)
        over_degraded = F.logsigmoid(scale * (cosine(good, text) - cosine(worse, text))).mean()
        over_miscaptioned = F.logsigmoid(scale * (cosine(good, text) - cosine(good, wrong))).mean()
        return contrastive(good, text, scale) - over_degraded - over_miscaptioned

    train("preference", steps["preference"], list(model.parameters()), 1e-3, batch, loss)


def token_table(tokenizer: PreTrainedTokenizerBase, sentences: list[str], device: torch.device) -> torch.Tensor:
    """Return padded token ids, (number of sentences, MAX_TOKENS), on the device."""
    fixed = {"padding": "max_length", "truncation": True, "max_length": parts.MAX_TOKENS}
    return tokenizer(sentences, return_tensors="pt", **fixed).input_ids.to(device)
