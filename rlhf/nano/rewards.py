"""Rewards of the nano world, with embedded weights.

Their scores have no meaning for other videos and prompts.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

import rlhf.nano
from rewards.common.weights import Frozen
from rewards.contract import RewardError
from rewards.models.clip import ClipScore
from rlhf.nano import judges, world

READABLE = {*judges.WORDS} - {"a", "an", "in", "of", "on", "the", "to", "with"}
CURE = {
    "expected": "a sentence of the nano world such as 'a small red circle moving left'",
    "cure": "correct the prompt, or choose another reward",
}
WEIGHTS = Path(rlhf.nano.__file__).parent / "weights"


class NanoClip(ClipScore):
    """CLIP score by the embedded open_clip model; further arguments as for ClipScore."""

    name = "nano_clip"

    def __init__(self, frames: str | int = "all", num_frames: int | str | None = 3, **kwargs):
        super().__init__(f"local-dir:{WEIGHTS / 'clip'}", frames=frames, num_frames=num_frames, **kwargs)


class NanoPreference(Frozen):
    """Cosine of clip and sentence embedding in [-1, 1], for prompt fidelity and clean rendering.

    A model of pairs: right over wrong captions, and less deformed clips over more deformed ones, by
    log-odds that grow with the difference.
    """

    name, frames = "nano_preference", "all"

    def __init__(self):
        super().__init__()
        self.model = judges.Preference()
        self.model.load_state_dict(load_file(WEIGHTS / "preference.safetensors"))
        self.freeze()

    def check_prompts(self, prompts: list[str]) -> None:
        """Raise RewardError for a prompt that names nothing of the nano world."""
        for prompt in prompts:
            if READABLE.isdisjoint(re.findall(r"[a-z]+", prompt.lower())):
                raise RewardError(self.name, got=f"the prompt {prompt!r}, of which it knows no word", **CURE)

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        """Return the cosine (B,) of each video with its prompt, in [-1, 1]."""
        ids = judges.word_ids(prompts).to(video_BCTHW.device)
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            return self.model(video_BCTHW.float(), ids)


class NanoVerifier(Frozen):
    """Scores 1 if colour, shape, motion and count agree with the prompt, else 0; no gradient.

    A shape, colour, motion or count that is none of the world's scores 0.
    Raises ValueError for a prompt without a colour, shape or motion of the nano world.
    """

    name, frames, differentiable = "nano_verifier", "all", False

    def __init__(self):
        super().__init__()
        self.model = judges.Verifier()
        self.model.load_state_dict(load_file(WEIGHTS / "verifier.safetensors"))
        self.freeze()

    def check_prompts(self, prompts: list[str]) -> None:
        """Raise RewardError for a prompt without a colour, shape or motion of the nano world."""
        for prompt in prompts:
            try:
                world.read_caption(prompt)
            except ValueError:
                got = f"the prompt {prompt!r}, which lacks a colour, a shape or a motion"
                raise RewardError(self.name, got=got, **CURE) from None

    @torch.no_grad()
    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        """Return 1 (B,) where the model sees all attributes that the prompt names, else 0."""
        wanted = [world.read_caption(prompt) for prompt in prompts]
        right = torch.ones(len(prompts), dtype=torch.bool, device=video_BCTHW.device)
        for key, logits in self.model(video_BCTHW.float()).items():
            right &= logits.argmax(1) == torch.tensor([w[key] for w in wanted], device=logits.device)
        return right.float()
