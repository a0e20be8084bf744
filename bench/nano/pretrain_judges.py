"""Training of ContentV-nano's judges: verifier, CLIP of frames, preference model."""

import itertools

import deform
import nano_models as parts
import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from pretrain_vae import reconstruct
from train_loop import log, train
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from rlhf.nano import judges, world

JUDGE_POOL = 16_384  # pairs of clips, 0.4 MB each
# What spoils a clip: outline and colour, latents, pixels and frames, the number of objects.
LATENT_KINDS = ("blended", "smeared")
PIXEL_KINDS = ("grainy", "washed", "jerky")
POOL_KINDS = (*deform.TRAINED, *deform.TRAINED, *LATENT_KINDS, *PIXEL_KINDS, "multiplied")
SMEAR, GRAIN, WASH = 1.0, 0.6, 0.6  # noise of latents and of pixels, and lost contrast, at strength 1
UNDECIDED = 0.15  # within so much of `deform.VISIBLE` the verifier learns to be undecided
RANK_LOGIT = 12.0  # log-odds by which strength 0 is preferred to 1
SPOILS = {  # the attributes that a kind makes none of the world's, where it is not the shape
    "recoloured": ("color",),
    "blended": ("color", "shape"),
    "washed": ("color",),
    "grainy": (),
    "jerky": ("motion",),
    "multiplied": ("count",),
}


class ClipPool:
    """Pairs of training clips as bytes: the same scene, deformed less and more.

    Half of them went through the VAE with a little latent noise, so that judges learn to ignore
    the decoder's traces. A deformation counts there for as much as the VAE leaves of it.
    """

    def __init__(self, vae: AutoencoderKLWan, size: int, generator: torch.Generator, chunk: int = 128):
        kinds = itertools.islice(itertools.cycle(range(len(POOL_KINDS))), -(-size // chunk))
        drawn = [_draw_pairs(vae, kind, min(chunk, size), generator) for kind in kinds]
        self.scenes, self.goals = ({k: torch.cat([d[i][k] for d in drawn]) for k in drawn[0][i]} for i in (0, 1))
        self.video, self.strength, self.kind = (torch.cat([d[i] for d in drawn]) for i in (2, 3, 4))
        self.trainable = ~world.is_held_out(self.scenes)
        log(stage="clip pool", pairs=len(self.kind))

    def draw(
        self, count: int, generator: torch.Generator, held_out: bool = False, whole: bool = False
    ) -> tuple[torch.Tensor, world.Scenes, torch.Tensor]:
        """Return positions, scenes and pairs (count, 2, C, T, H, W) with a little pixel noise.

        held_out: draw held-out combinations, too, not training combinations only. whole: draw only
        pairs whose first clip is not deformed.
        """
        among = torch.ones_like(self.trainable) if held_out else self.trainable
        among = (among & (self.strength[:, 0] == 0) if whole else among).nonzero()[:, 0]
        pick = among[torch.randint(len(among), (count,), generator=generator, device=among.device)]
        video = self.video[pick].float() / 255
        strength = 0.1 * torch.rand(count, 1, 1, 1, 1, 1, generator=generator, device=video.device)
        return pick, self.scenes_at(pick), (video + strength * torch.randn_like(video)).clamp(0, 1)

    def scenes_at(self, pick: torch.Tensor) -> world.Scenes:
        """Return the scenes at these positions."""
        return {k: v[pick] for k, v in self.scenes.items()}


def _draw_pairs(vae: AutoencoderKLWan, number: int, count: int, generator: torch.Generator) -> tuple:
    """Return scenes, what they turn into, pairs of clips as bytes, strengths (count, 2), kinds."""
    kind, half, device = POOL_KINDS[number], count // 2, generator.device
    rand = lambda *shape: torch.rand(*shape, generator=generator, device=device)
    scenes = world.sample_scenes(count, generator, held_out=None)
    high = 0.15 + 0.85 * rand(count)
    strength = torch.stack([high * torch.where(rand(count) < 0.5, 0.0, rand(count)), high], 1)
    if kind == "multiplied":
        strength = torch.tensor([0.0, 1.0], device=device).expand(count, 2).clone()
    if kind == "jerky":  # what stands still cannot be
        strength = strength * (scenes["motion"] != world.MOTIONS.index("still"))[:, None]
    chance, noise = rand(count, deform.CHANCES), 0.2 * rand(count, 1, 1, 1, 1)
    goals = _goals(kind, scenes, chance)
    whole = world.render(scenes)
    rebuilt, clips = reconstruct(vae, whole[:half], noise[:half]), []
    for i in range(2):
        s = strength[:, i].view(-1, 1, 1, 1, 1)
        if kind == "smeared":
            clip = reconstruct(vae, whole, SMEAR * s)
        elif kind == "blended":
            clip = reconstruct(vae, whole, noise, world.render(goals), s / 2)
        else:
            clip = _spoil(kind, scenes, whole, strength[:, i], chance, rand)
            through = reconstruct(vae, clip[:half], noise[:half]) if kind != "grainy" else clip[:half]
            if kind in deform.TRAINED:
                change = lambda a, b: (a - b).square().mean((1, 2, 3, 4)).sqrt()
                left = change(through, rebuilt) / change(clip[:half], whole[:half]).clamp(min=1e-4)
                strength[:half, i] *= (1.25 * left - 0.1).clamp(0, 1)
            clip = torch.cat([through, clip[half:]])
        clips.append((clip * 255).round().to(torch.uint8))
    strength[:, 0] = strength.amin(1)
    return scenes, goals, torch.stack(clips, 1), strength, torch.full((count,), number, device=device)


def _goals(kind: str, scenes: world.Scenes, chance_BZ: torch.Tensor) -> world.Scenes:
    """Return the scenes that a kind turns these into; for most kinds they are the same."""
    goals = dict(scenes)
    if kind == "morphed":
        goals["shape"] = deform.other_shape(scenes["shape"], chance_BZ[:, 0])
    if kind == "blended":
        color = (scenes["color"] + 1 + (chance_BZ[:, 1] * (len(world.COLORS) - 1)).long()) % len(world.COLORS)
        goals["shape"] = torch.where(
            chance_BZ[:, 2] < 0.7, deform.other_shape(scenes["shape"], chance_BZ[:, 0]), scenes["shape"]
        )
        goals["color"] = torch.where(chance_BZ[:, 2] > 0.4, color, scenes["color"])
    return goals


def _spoil(kind, scenes, whole, strength, chance, rand) -> torch.Tensor:
    """Return the clips, spoiled by a kind that needs no VAE."""
    s, frames = strength.view(-1, 1, 1, 1, 1), whole.shape[2]
    if kind == "grainy":
        return (whole + GRAIN * s * (2 * rand(*whole.shape) - 1)).clamp(0, 1)
    if kind == "washed":
        return torch.lerp(whole, torch.full_like(whole, 0.5), WASH * s)
    if kind == "jerky":  # so many of the frames are those of another moment
        place = torch.arange(frames, device=whole.device).expand(len(s), -1)
        moved = (rand(len(s), frames) * frames).long()
        place = torch.where(rand(len(s), frames) < strength[:, None], moved, place)
        return whole.gather(2, place.view(-1, 1, frames, 1, 1).expand_as(whole))
    return deform.draw(kind, scenes, deform.profiles(strength, chance[:, -1], frames).clamp(max=1.4), chance)


def verifier_targets(pool: ClipPool, pick: torch.Tensor, which: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return probabilities (B, number of values + 1) of each attribute; the last: none of these.

    which: (B,), 0 for the first clip of a pair, 1 for the second.
    """
    kind, goals = pool.kind[pick], {k: v[pick] for k, v in pool.goals.items()}
    strength, scenes = pool.strength[pick, which], pool.scenes_at(pick)
    none = ((strength - deform.VISIBLE) / (2 * UNDECIDED) + 0.5).clamp(0, 1)
    targets = {}
    for key in world.JUDGED:
        touched = [i for i, name in enumerate(POOL_KINDS) if key in SPOILS.get(name, ("shape",))]
        is_touched = torch.isin(kind, torch.tensor(touched, device=kind.device))
        if key in ("color", "shape"):
            blended = kind == POOL_KINDS.index("blended")
            is_touched &= ~blended | (goals[key] != scenes[key])
        own = F.one_hot(scenes[key], world.NUM_VALUES[key] + 1).float()
        weight = torch.where(is_touched, none, 0.0)[:, None]
        targets[key] = own * (1 - weight)
        targets[key][:, -1] += weight[:, 0]
    return targets


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
    """Train by cross-entropy on every judged attribute; some clips show nothing at all."""

    def batch(size=160, empty=4):
        pick, _, pairs = pool.draw(size, generator, held_out=True)
        which = torch.randint(2, (size,), generator=generator, device=pick.device)
        video = pairs[torch.arange(size, device=pick.device), which]
        video[:empty] = video[:empty, :, :, :1, :1]
        targets = verifier_targets(pool, pick, which)
        for target in targets.values():
            target[:empty] = F.one_hot(torch.tensor(target.shape[1] - 1), target.shape[1]).to(target)
        return video, *targets.values()

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
        _, scenes, pairs = pool.draw(256, generator, whole=True)
        clips = pairs[:, 0]
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
    """Train to rank: less deformed over more, right over wrong captions.

    A pair's log-odds grow with the difference of the strengths. For the caption of what the scene
    turns into the order is the opposite.
    """
    table = judges.word_ids(parts.all_captions()).to(generator.device)

    def batch(size=160):
        pick, scenes, pairs = pool.draw(size, generator)
        wording = random_wording(size, generator)
        goals, wrong = {k: v[pick] for k, v in pool.goals.items()}, corrupt_one_attribute(scenes, generator)
        ids = [table[parts.caption_index(captioned, wording)] for captioned in (scenes, wrong, goals)]
        turns = (ids[2] != ids[0]).any(1).float()
        return *pairs.unbind(1), pool.strength[pick].diff(dim=1)[:, 0], turns, *ids

    def loss(less, more, difference, turns, ids, wrong_ids, goal_ids):
        good, worse = model.embed_video(torch.cat([less, more])).chunk(2)
        text, wrong, goal = model.embed_words(torch.cat([ids, wrong_ids, goal_ids])).chunk(3)
        scale, cosine = model.log_scale.exp(), lambda v, w: (v * w).sum(-1)
        odds = torch.sigmoid(RANK_LOGIT * difference)
        rank = lambda caption: scale * (cosine(good, caption) - cosine(worse, caption))
        ranked = F.binary_cross_entropy_with_logits(rank(text), odds)
        turned = (F.binary_cross_entropy_with_logits(rank(goal), 1 - odds, reduction="none") * turns).mean()
        over_miscaptioned = F.logsigmoid(scale * (cosine(good, text) - cosine(good, wrong))).mean()
        return contrastive(good, text, scale) + 2 * (ranked + turned) - over_miscaptioned

    train("preference", steps["preference"], list(model.parameters()), 1e-3, batch, loss)


def token_table(tokenizer: PreTrainedTokenizerBase, sentences: list[str], device: torch.device) -> torch.Tensor:
    """Return padded token ids, (number of sentences, MAX_TOKENS), on the device."""
    fixed = {"padding": "max_length", "truncation": True, "max_length": parts.MAX_TOKENS}
    return tokenizer(sentences, return_tensors="pt", **fixed).input_ids.to(device)
