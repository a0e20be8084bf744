"""Distil a reward into a head on the generator's first blocks: `python -m rewards.distill`.

    python -m rewards.distill --head NEW.safetensors [--blocks 8] [--config FILE] [--any_key value]

The base samples videos, the rewards of the config score them, and the head learns to predict the
total of the scores from the noisy latents on the way. Nobody labels anything, and a reward without
a gradient will do. The held-out prompts then say how well it ranks videos at each noise level:
beside the head, and in a JSON file of its name. `latent_reward` is the reward of such a head.

Shape legend: B batch, C channels, T latent frames, H W latent height and width, M videos, S states.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from rewards import RewardError
from rewards.contract import refuse_latents
from rewards.models.latent_reward import NAME, PUBLISHED_BLOCKS, HeadFacts, LatentHead, save_head
from rlhf.checks import check_config
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.config.parse import CONFIGS, parse_config
from rlhf.config.settings import SAMPLING_KEYS
from rlhf.device import generator
from rlhf.distributed.launch import launcher_world_size
from rlhf.evaluation.statistics import rank_correlation
from rlhf.generator.files import model_sizes, transformer_digest
from rlhf.generator.first_blocks import FirstBlocks, first_blocks, load_first_blocks
from rlhf.io import write_json
from rlhf.method.rollout import draw_noise, sample_euler
from rlhf.run.metrics import progress_bar
from rlhf.trainer import RewardGradientTrainer
from rlhf.training.rewards import open_rewards
from rlhf.training.setup import base_dtype

# Settings of the run that a head is distilled with; the others do not matter to it.
READ = (
    *SAMPLING_KEYS,
    *("model", "dtype", "device", "cpu_threads", "prompts", "eval_prompts", "base_dir"),
    *("reward_funcs", "reward_weights", "reward_kwargs", "reward_timeout", "normalise_rewards", "reward_mix"),
    *("reward_caps", "reward_targets", "attention_kernel", "guidance_together", "decode_chunk", "vae_dtype"),
    *("num_eval_prompts", "per_device_eval_batch_size", "eval_seed", "seed"),
)
TOLD = ("reward_funcs", "reward_weights", "reward_kwargs", "normalise_rewards", "reward_mix", *SAMPLING_KEYS)
GROUP = 2  # videos of each prompt: what differs between them is no matter of the words
HELD_OUT_LEVELS = 10
CACHED_BYTES = 4 * 2**30  # of tokens that are not computed anew in every epoch
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2


@dataclasses.dataclass
class Videos:
    """Videos of the base: prompts, scores (M,) and, by index of noise level, rows and states."""

    prompts: list[str]
    scores_M: torch.Tensor
    states: dict[int, list[tuple[int, torch.Tensor]]]  # index of sigma -> (row, latents (C, T, H, W))


def parse_distill_args(argv: list[str] | None) -> tuple[argparse.Namespace, RewardGradientConfig]:
    """Return the command's own flags and the settings. Raises ConfigError for wrong ones."""
    parser = argparse.ArgumentParser(prog="python -m rewards.distill", description=__doc__.split("\n\n")[0])
    parser.add_argument("--head", type=Path, required=True, help="file to write, .safetensors")
    parser.add_argument("--blocks", type=int, help=f"of the transformer; default {PUBLISHED_BLOCKS}, at most half")
    parser.add_argument("--videos", type=int, default=1024, help="of the base, to learn from; default 1024")
    parser.add_argument("--levels", type=int, default=5, help="noise levels of each video, drawn; default 5")
    parser.add_argument("--epochs", type=int, default=4, help="passes over all states; default 4")
    parser.epilog = "All other flags, and --config, are those of train_rlhf.py."
    given, rest = parser.parse_known_args(argv)
    args = parse_config(rest, CONFIGS / "nano.yaml")
    problems = [
        f"--{name}: got {getattr(given, name)}, expected at least {least}; raise it"
        for name, least in (("videos", 2), ("levels", 1), ("epochs", 1))
        if getattr(given, name) < least
    ]
    if given.head.suffix != ".safetensors" or given.head.exists() or given.head.with_suffix(".json").exists():
        problems.append(
            f"--head: got {given.head}, expected a new file .safetensors, and none beside it .json; choose another name"
        )
    if args.initial_adapter:
        cure = "merge it (python -m rlhf.export RUN --merged OUT), and name OUT as model"
        problems.append(f"initial_adapter: got {args.initial_adapter}, expected a base without one; {cure}")
    if args.eval_prompts is None:
        problems.append("eval_prompts: got none, expected held-out prompts, on which the head is judged; name some")
    if args.calibrate_rewards:
        cure = "set it to 0, or let the rewards state what was measured"
        got, expected = args.calibrate_rewards, "0, since a head predicts scores by the mean and std that rewards state"
        problems.append(f"calibrate_rewards: got {got}, expected {expected}; {cure}")
    if (count := launcher_world_size()) > 1:
        problems.append(f"processes: got {count}, expected one, which samples all videos; start without a launcher")
    if problems:
        raise ConfigError(problems)
    config = model_sizes(args.model)["transformer"]
    given.blocks = given.blocks or min(PUBLISHED_BLOCKS, max(1, config["num_layers"] // 2))
    first_blocks(config, given.blocks)  # raises ValueError
    return given, args


def distill(given: argparse.Namespace, args: RewardGradientConfig) -> dict:
    """Sample, score, train and judge; write the head and its JSON file; return what that says."""
    began, size = time.perf_counter(), GROUP * -(-args.per_device_eval_batch_size // GROUP)
    kept = {name: getattr(args, name) for name in READ}
    args = RewardGradientConfig(
        **kept,
        output_dir=str(given.head.with_suffix("")),  # never written
        report_to=["none"],
        method="nft",  # whose rewards need no gradient
        method_kwargs={"group_size": GROUP},
        per_device_train_batch_size=size,
        max_steps=-(-given.videos // size),
        num_diversity_prompts=0,
    )
    args = check_config(args)
    rewards = open_rewards(args)
    for name, reward in rewards.items():
        refuse_latents(name, reward, "distil a reward of pixels; several are predicted as their total")
    trainer = RewardGradientTrainer(args=args, opened_rewards=rewards)
    steps = len(trainer.sigmas) - 1
    with torch.no_grad():
        videos, held_out = sample_all(trainer, given, steps), sample_held_out(trainer, steps)
    sampled = time.perf_counter()
    if not (std := videos.scores_M.std().item()) > 0:
        got, cure = f"a spread of {std} over the base's videos", "name a reward that tells them apart"
        raise RewardError(", ".join(args.reward_funcs), got=got, expected="scores that differ", cure=cure)
    dtype = base_dtype(args.dtype)
    blocks = FirstBlocks(load_first_blocks(args.model, given.blocks, dtype).to(trainer.device))
    head, facts = train_head(trainer, blocks, videos, given.epochs)
    rows = judge(trainer, blocks, head, held_out)
    ended = time.perf_counter()
    figures = {"levels": rows, "videos": len(videos.prompts), "held_out_videos": len(held_out.prompts)}
    figures |= {"epochs": given.epochs, "seconds": {"sampling": sampled - began, "training": ended - sampled}}
    told = {name: getattr(args, name) for name in TOLD}
    saved = HeadFacts(str(args.model), transformer_digest(args.model), given.blocks, told, *facts, figures)
    given.head.parent.mkdir(parents=True, exist_ok=True)
    save_head(given.head, head, saved)
    write_json(given.head.with_suffix(".json"), vars(saved))
    return vars(saved)


def sample_all(trainer: RewardGradientTrainer, given: argparse.Namespace, steps: int) -> Videos:
    """Sample and score the base's videos of the training prompts, at levels drawn for each."""
    found = Videos([], torch.zeros(0), {})
    with progress_bar("sample", "video", given.videos, shown=True) as bar:
        for number in range(trainer.args.max_steps):
            batch = trainer.batches.batch(number, 0)
            draw = lambda row, number=number: torch.randperm(
                steps, generator=generator("distill levels", trainer.args.seed, number, row)
            )[: given.levels]
            prompts = batch.prompts[: given.videos - len(found.prompts)]
            add_videos(found, trainer, prompts, batch.noise("distill")[: len(prompts)], draw)
            bar.update(len(prompts))
    return found


def sample_held_out(trainer: RewardGradientTrainer, steps: int) -> Videos:
    """Sample and score two videos of each held-out prompt, all at the same levels."""
    levels = torch.linspace(0, steps - 1, min(steps, HELD_OUT_LEVELS)).round().long()
    prompts, found = trainer.eval_prompts, Videos([], torch.zeros(0), {})
    places, size = [(i, j) for i in range(len(prompts)) for j in range(GROUP)], trainer.batches.size
    for start in range(0, len(places), size):
        keys = places[start : start + size]
        noise = draw_noise(trainer.batches.noise_shape, trainer.args.eval_seed, "distill held out", keys)
        add_videos(found, trainer, [prompts[i] for i, _ in keys], noise.to(trainer.device), lambda row: levels)
    return found


def add_videos(found: Videos, trainer: RewardGradientTrainer, prompts: list[str], noise: torch.Tensor, draw) -> None:
    """Sample and score a batch, and add it to `found`, with states at the levels of `draw(row)`."""
    states = sample_euler(trainer.fields.base(trainer.text(prompts, trainer.device)), noise, trainer.sigmas)
    video = trainer.scorer.decode(states[-1], 0)
    scores_B, _ = trainer.rewards(video, prompts, **trainer.scorer.info(0))
    for row in range(len(prompts)):
        for level in draw(row).tolist():  # the first state is noise, which no method scores
            kept = len(found.prompts) + row, states[level + 1][row].cpu()
            found.states.setdefault(level + 1, []).append(kept)
    found.prompts += prompts
    found.scores_M = torch.cat([found.scores_M, scores_B.cpu()])


def tokens_of(trainer: RewardGradientTrainer, blocks: FirstBlocks, videos: Videos, level: int, part: list) -> tuple:
    """Compute the blocks' tokens of a batch of states at one level.

    part: (row, state) of each. Returns the rows, the tokens (B, N, E) and the noise level.
    """
    rows = [row for row, _ in part]
    cond = trainer.text([videos.prompts[row] for row in rows], trainer.device)
    latents, sigma = torch.stack([x for _, x in part]).to(trainer.device), trainer.sigmas[level].item()
    with torch.no_grad():
        return rows, blocks(latents, sigma, cond.prompt_embeds_BLD, cond.pooled_embeds_BP), sigma


def batches_of(videos: Videos, size: int, seed: int) -> Iterator[tuple[int, list]]:
    """Yield (level, rows with states) of all states, in batches of one level each."""
    for level, states in sorted(videos.states.items()):
        order = torch.randperm(len(states), generator=generator("distill batches", seed, level)).tolist()
        for start in range(0, len(order), size):
            yield level, [states[i] for i in order[start : start + size]]


def train_head(
    trainer: RewardGradientTrainer, blocks: FirstBlocks, videos: Videos, epochs: int
) -> tuple[LatentHead, tuple[float, float]]:
    """Fit a head to the scores by least squares; return it with the scores' mean and spread."""
    seed, device = trainer.args.seed, trainer.device
    mean, std = videos.scores_M.mean().item(), videos.scores_M.std().item()
    targets_M = ((videos.scores_M - mean) / std).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = LatentHead(blocks.width)
    optimizer = torch.optim.AdamW(head.to(device).parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    parts, cached = list(batches_of(videos, trainer.batches.size, seed)), {}
    total, done, free = epochs * len(parts), 0, CACHED_BYTES
    with progress_bar("train the head", "batch", total, shown=True) as bar:
        for epoch in range(epochs):
            for i in torch.randperm(len(parts), generator=generator("distill order", seed, epoch)).tolist():
                rows, tokens, sigma = cached.get(i) or tokens_of(trainer, blocks, videos, *parts[i])
                if i not in cached and free > tokens.nbytes:
                    cached[i], free = (rows, tokens, sigma), free - tokens.nbytes
                optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * done / total)) / 2
                loss = (head(tokens, sigma) - targets_M[rows]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
                bar.update(1)
    return head.requires_grad_(False).eval(), (mean, std)


@torch.no_grad()
def judge(trainer: RewardGradientTrainer, blocks: FirstBlocks, head: LatentHead, held_out: Videos) -> list[dict]:
    """Return, by noise level, how the head ranks held-out videos.

    {"sigma", "spearman": rank correlation with the scores, "pairs": share of prompts whose two
    videos it orders as the scores do (equal scores do not count; None if all are), "n": videos}.
    """
    rows = []
    for level in sorted(held_out.states):
        states, found_M = held_out.states[level], torch.zeros_like(held_out.scores_M)
        for start in range(0, len(states), trainer.batches.size):
            part = states[start : start + trainer.batches.size]
            places, tokens, sigma = tokens_of(trainer, blocks, held_out, level, part)
            found_M[places] = head(tokens, sigma).cpu()
        a, b = (x.view(-1, GROUP).diff(dim=1).squeeze(1) for x in (found_M, held_out.scores_M))
        right = (a[b != 0] * b[b != 0] > 0).float()
        pairs = right.mean().item() if len(right) else None
        correlation = rank_correlation(found_M, held_out.scores_M)
        rows.append({"sigma": sigma, "spearman": correlation, "pairs": pairs, "n": len(found_M)})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        given, args = parse_distill_args(argv)
        told = distill(given, args)
    except (ValueError, OSError) as error:  # ConfigError and RewardError are ValueErrors
        print(f"rewards.distill: {error}", file=sys.stderr)
        return 1
    print(f"\n{'sigma':>6} {'rank correlation':>17} {'pairs in order':>15}   (held out)")
    for row in told["figures"]["levels"]:
        pairs = "-" if row["pairs"] is None else f"{row['pairs']:.0%}"
        print(f"{row['sigma']:6.3f} {row['spearman']:17.3f} {pairs:>15}")
    print(f"\n{given.head}: use it by --reward_funcs {NAME} --reward_kwargs '{{{NAME}: {{path: {given.head}}}}}'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
