"""Rewards and the judge of the embedded nano world, loaded from the weights that come with the package.

They know the nano world only: on other videos and prompts their scores mean nothing.
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
    """CLIP score by the embedded open_clip model: mean cosine of frames and prompt, in [-1, 1].

    num_frames of the frames are scored, evenly spaced. Other arguments as in `ClipScore`.
    """

    name = "nano_clip"

    def __init__(self, frames: str | int = "all", num_frames: int | str | None = 3, **kwargs):
        super().__init__(f"local-dir:{WEIGHTS / 'clip'}", frames=frames, num_frames=num_frames, **kwargs)


class NanoPreference(Frozen):
    """How well and how cleanly a clip shows its prompt: cosine of clip and sentence embedding, in [-1, 1].

    A Bradley-Terry model of pairs that need no labels: clean over degraded renders, right over wrong captions.
    """

    name, frames = "nano_preference", "all"

    def __init__(self):
        super().__init__()
        self.model = judges.Preference()
        self.model.load_state_dict(load_file(WEIGHTS / "preference.safetensors"))
        self.freeze()

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        ids = judges.word_ids(prompts).to(video_BCTHW.device)
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            return self.model(video_BCTHW.float(), ids)


class NanoVerifier(Frozen):
    """1 where colour, shape, motion and count of the clip are all what the prompt says, else 0. No gradient.

    `read` gives the single attributes. Raises ValueError for a prompt that names no colour, shape or motion of the
    world.
    """

    name, frames, differentiable = "nano_verifier", "all", False

    def __init__(self):
        super().__init__()
        self.model = judges.Verifier()
        self.model.load_state_dict(load_file(WEIGHTS / "verifier.safetensors"))
        self.freeze()

    @torch.no_grad()
    def read(self, video_BCTHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Indices (B,) of the values that the clip shows, by attribute (`rlhf.nano.world.JUDGED`)."""
        return {key: logits.argmax(1) for key, logits in self.model(video_BCTHW.float()).items()}

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        seen, wanted = self.read(video_BCTHW), [world.read_caption(prompt) for prompt in prompts]
        right = torch.ones(len(prompts), dtype=torch.bool, device=video_BCTHW.device)
        for key, values in seen.items():
            right &= values == torch.tensor([w[key] for w in wanted], device=values.device)
        return right.float()
