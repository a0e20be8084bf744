"""Rewards of the nano world, with embedded weights.

Their scores have no meaning for other videos and prompts.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

import rlhf.nano
from rewards.common.weights import Frozen
from rewards.models.clip import ClipScore
from rlhf.nano import judges, world

WEIGHTS = Path(rlhf.nano.__file__).parent / "weights"


class NanoClip(ClipScore):
    """CLIP score by the embedded open_clip model; further arguments as for ClipScore."""

    name = "nano_clip"

    def __init__(self, frames: str | int = "all", num_frames: int | str | None = 3, **kwargs):
        super().__init__(f"local-dir:{WEIGHTS / 'clip'}", frames=frames, num_frames=num_frames, **kwargs)


class NanoPreference(Frozen):
    """Cosine of clip and sentence embedding in [-1, 1], for prompt fidelity and clean rendering.

    A Bradley-Terry model of two kinds of pairs: clean over degraded renders, right over wrong
    captions.
    """

    name, frames = "nano_preference", "all"

    def __init__(self):
        super().__init__()
        self.model = judges.Preference()
        self.model.load_state_dict(load_file(WEIGHTS / "preference.safetensors"))
        self.freeze()

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        """Return scores (B,)."""
        ids = judges.word_ids(prompts).to(video_BCTHW.device)
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            return self.model(video_BCTHW.float(), ids)


class NanoVerifier(Frozen):
    """Scores 1 if colour, shape, motion and count agree with the prompt, else 0; no gradient.

    Raises ValueError for a prompt without a colour, shape or motion of the nano world.
    """

    name, frames, differentiable = "nano_verifier", "all", False

    def __init__(self):
        super().__init__()
        self.model = judges.Verifier()
        self.model.load_state_dict(load_file(WEIGHTS / "verifier.safetensors"))
        self.freeze()

    @torch.no_grad()
    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        """Return scores (B,)."""
        wanted = [world.read_caption(prompt) for prompt in prompts]
        right = torch.ones(len(prompts), dtype=torch.bool, device=video_BCTHW.device)
        for key, logits in self.model(video_BCTHW.float()).items():
            right &= logits.argmax(1) == torch.tensor([w[key] for w in wanted], device=logits.device)
        return right.float()
