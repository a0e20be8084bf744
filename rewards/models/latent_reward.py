"""A reward of noisy latents: a head on the generator's frozen first blocks (arXiv 2511.21541).

PAVRM, in that paper, is trained on labelled videos. Here `python -m rewards.distill` trains the
head to predict a reward of pixels on videos of the base, so that nobody labels anything.

Shape legend: B batch, C channels, T latent frames, H W latent height and width, N video tokens,
E width of the transformer, Q queries, L text tokens, D text width, P pooled text width.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from rewards.common.weights import Frozen
from rewards.contract import RewardError
from rlhf.generator.files import model_sizes, transformer_digest
from rlhf.generator.first_blocks import FirstBlocks, first_blocks, load_first_blocks
from rlhf.generator.registry import DEFAULT_MODEL
from rlhf.io import file_errors, save_tensors

FORMAT = "contentv-rlhf latent reward 1"
PUBLISHED_BLOCKS = 8  # of the paper
NAME = "latent_reward"


class LatentHead(nn.Module):
    """Tokens (B, N, E) and their noise level -> (B,), a score in units of its spread.

    Q learned queries pool the tokens by attention, as in PAVRM; two layers score the result.
    """

    def __init__(self, width: int, queries: int = 4, hidden: int = 128):
        super().__init__()
        self.norm, self.key, self.value = nn.LayerNorm(width), nn.Linear(width, queries), nn.Linear(width, hidden)
        self.score = nn.Sequential(nn.Linear(queries * hidden + 1, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, tokens_BNE: torch.Tensor, sigma: float) -> torch.Tensor:
        """Return standardised scores (B,), float32, of tokens at noise level sigma."""
        x = self.norm(tokens_BNE.float())
        weights_BNQ = self.key(x).softmax(1)
        pooled = torch.einsum("bnq,bnh->bqh", weights_BNQ, self.value(x)).flatten(1)
        return self.score(torch.cat([pooled, torch.full_like(pooled[:, :1], sigma)], 1)).squeeze(1)


@dataclass(frozen=True)
class HeadFacts:
    """Facts that the file of a head states."""

    model: str  # the generator: nano, a folder or a hub id
    digest: str  # `transformer_digest` of the base
    blocks: int
    reward: dict[str, Any]  # settings of the rewards that it predicts
    mean: float  # of their total on videos of the base
    std: float
    figures: dict[str, Any]  # held-out rank correlation by noise level, and how it was trained


def save_head(path: Path, head: LatentHead, facts: HeadFacts) -> None:
    """Write a head as safetensors, whole or not at all."""
    save_tensors(path, head.state_dict(), {"format": FORMAT} | {k: json.dumps(v) for k, v in vars(facts).items()})


def read_facts(path: str | Path) -> HeadFacts:
    """Return what the file of a head says of it. Raises RewardError for another file."""
    expected, cure = "a head that `python -m rewards.distill` wrote", f"correct `path` in reward_kwargs.{NAME}"
    path = Path(path).expanduser()
    if not path.is_file():
        raise RewardError(NAME, got=f"no file {path}", expected=expected, cure=cure)
    with file_errors(path), safe_open(path, "pt") as file:
        told = file.metadata() or {}
        if told.get("format") != FORMAT:
            raise RewardError(NAME, got=f"{path} of format {told.get('format')}", expected=expected, cure=cure)
        return HeadFacts(**{name: json.loads(told[name]) for name in HeadFacts.__dataclass_fields__})


class LatentReward(Frozen):
    """The reward of pixels that a head was distilled from, predicted of latents at any noise level.

    Args:
        path: the head's file.
        model: where the base is now, if not where the head was distilled: a folder or a hub id.
        recompute: recompute the blocks in the backward pass: a third more time, much less memory.

    The blocks are loaded once more, beside those of the generator. Raises RewardError for another
    base than the one that the head was distilled on.
    """

    name, space = NAME, "latents"

    def __init__(self, path: str | Path, model: str | Path | None = None, recompute: bool = True):
        path, facts = Path(path).expanduser(), read_facts(path)
        self._require_base(facts, "the model", model or facts.model, transformer_digest(model or facts.model))
        self._build(facts, load_first_blocks(model or facts.model, facts.blocks), recompute)
        with file_errors(path), safe_open(path, "pt") as file:
            self.head.load_state_dict({name: file.get_tensor(name) for name in self.head.state_dict()})
        self.freeze()

    def _build(self, facts: HeadFacts, transformer: nn.Module, recompute: bool) -> None:
        """Set up the module with the facts, these blocks and a head of random weights."""
        super().__init__()
        self.facts, self.mean, self.std = facts, facts.mean, facts.std
        self.blocks = FirstBlocks(transformer, recompute)
        self.head = LatentHead(self.blocks.width)

    @classmethod
    def random_init(
        cls,
        config: dict[str, Any] | None = None,
        blocks: int = PUBLISHED_BLOCKS,
        dtype: torch.dtype = torch.bfloat16,
        recompute: bool = True,
    ) -> "LatentReward":
        """Return the reward on random first blocks of a config, by default of `DEFAULT_MODEL`."""
        reward, config = cls.__new__(cls), config or model_sizes(DEFAULT_MODEL)["transformer"]
        transformer = nn.Module.to(first_blocks(config, blocks), dtype)
        transformer.to_empty(device=torch.get_default_device())
        reward._build(HeadFacts("", "", blocks, {}, 0.0, 1.0, {}), transformer, recompute)
        for weight in reward.blocks.parameters():
            nn.init.normal_(weight, std=0.02)
        return reward.freeze()

    def check_generator(self, name: str, digest: str) -> None:
        """Raise RewardError unless `digest` is that of the head's base. name: for the message."""
        self._require_base(self.facts, "a run on", name, digest)

    @staticmethod
    def _require_base(facts: HeadFacts, what: str, name: str | Path, digest: str) -> None:
        """Raise RewardError unless `digest` is that of the head's base. what, name: its words."""
        if digest != facts.digest:
            raise RewardError(
                NAME,
                got=f"{what} {name}, whose transformer is not the one that the head was distilled on",
                expected=f"{facts.model} as it was then (digest {facts.digest[:12]})",
                cure="distill a head on this base by `python -m rewards.distill` (merge an initial_adapter first, by "
                "`python -m rlhf.export RUN --merged OUT`), or name the base of the head",
            )

    def forward(
        self,
        latents_BCTHW: torch.Tensor,
        prompts: list[str],
        *,
        sigma: float,
        text: torch.Tensor,
        pooled: torch.Tensor,
        **info,
    ) -> torch.Tensor:
        """Return scores (B,) of latents at the noise level sigma; text (B, L, D), pooled (B, P)."""
        with torch.autocast(latents_BCTHW.device.type, enabled=False):
            tokens = self.blocks(latents_BCTHW, sigma, text, pooled)
            return self.mean + self.std * self.head(tokens, sigma)
