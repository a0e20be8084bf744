"""Real videos in the loop: latents cached once, a flow-matching loss, starts without a rollout.

Shape legend: B batch, C channels, T latent frames, H W latent height and width.
"""

import hashlib

import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open

from rewards.cli.files import read_video
from rewards.score_cache import content_sha256
from rlhf.config import RewardGradientConfig
from rlhf.distributed.layout import Layout
from rlhf.evaluation.video_set import Video
from rlhf.generator.pipeline import VideoPipeline
from rlhf.generator.text import PromptCache
from rlhf.generator.wan_encoder import encode_video
from rlhf.io import file_errors, save_tensors
from rlhf.method.flow_matching import draw_sigmas, flow_matching_loss
from rlhf.method.options import MethodOptions
from rlhf.method.rollout import RolloutCache
from rlhf.method.velocity import VelocityFields
from rlhf.prompts.videos import clip_size, entry_folder
from rlhf.run.metrics import progress_bar
from rlhf.training.batches import Batches
from rlhf.types import row_of

VERSION = 1  # to be raised when latents of a file change
VALUES_COMPARED = 64  # of each weight


class AnchorData:
    """A run's real videos: their order, their latents, and the loss that holds the model to them.

    The latents of a video are a safetensors file in its `entry_folder`, whose name has size and
    frame rate, and a digest of the VAE.
    """

    def __init__(
        self,
        videos: list[Video],
        noise_shape_CTHW: tuple[int, int, int, int],
        pipe: VideoPipeline,
        args: RewardGradientConfig,
        options: MethodOptions,
        layout: Layout,
    ):
        self.videos, self.layout, self.files = videos, layout, {}
        self.every, self.shift = max(1, options.anchor_data_steps), pipe.scheduler.config.shift
        self.size, self.captions = clip_size(args, pipe.sampling.fps), [video.prompt for video in videos]
        size, per_step = args.per_device_train_batch_size, args.gradient_accumulation_steps
        self.batches = Batches(
            self.captions, noise_shape_CTHW, layout, args.seed, size, per_step, self.every, args.max_steps
        )

    def encode(self, vae: AutoencoderKLWan) -> None:
        """Encode the videos whose latents are not cached; all processes share the work.

        Each file is written whole, so that an interrupted start goes on where it was.
        """
        if not self.videos:
            return
        name, processes = f"{self.size}-{vae_identity(vae)}.safetensors", self.layout.accelerator
        self.files = {_key(video.prompt): entry_folder(content_sha256(video.path)) / name for video in self.videos}
        shares = self.videos[processes.process_index :: processes.num_processes], self.videos
        for share in shares:  # then what another host encoded into a cache of its own
            missing = [video for video in share if not self.files[_key(video.prompt)].is_file()]
            with progress_bar("encode", "video", len(missing), processes.is_main_process and bool(missing)) as bar:
                for video in missing:
                    pixels = read_video(video.path, self.size.num_frames, self.size.fps).pixels_BCTHW
                    latents = {"latents": encode_video(vae, pixels.to(self.layout.device))[0]}
                    about = {"file": row_of(video.prompt)["file"]}
                    save_tensors(self.files[_key(video.prompt)], latents, about, shared=True)
                    bar.update()
            processes.wait_for_everyone()

    def latents(self, captions: list[str]) -> torch.Tensor:
        """Return the latents (B, C, T, H, W) of the videos with these captions, on the device."""
        return torch.stack([self._load(caption) for caption in captions]).to(self.layout.device)

    def _load(self, caption: str) -> torch.Tensor:
        """Read a video's cached latents."""
        path = self.files[_key(caption)]
        with file_errors(path), safe_open(path, "pt") as file:
            return file.get_tensor("latents")

    def loss(self, step: int, micro: int, text: PromptCache, fields: VelocityFields) -> torch.Tensor:
        """Return the flow-matching loss (B,) of a batch of videos, with gradient."""
        batch = self.batches.batch(step // self.every, micro)
        velocity = fields.unguided(text(batch.prompts, self.layout.device))
        sigma_B = draw_sigmas(batch.noise("data level", (1, 1, 1, 1)).flatten(), self.shift)
        return flow_matching_loss(velocity, self.latents(batch.prompts), batch.noise("data"), sigma_B)

    def state(self, done: int) -> dict:
        """Return the place in the order of the videos after `done` steps, for a checkpoint."""
        return {"anchor_data": self.batches.state(done)} if self.videos else {}

    def restore(self, saved: dict) -> None:
        """Continue the order of the videos from a checkpoint's state, if there are any."""
        if self.videos:
            self.batches.restore(saved["step"], saved.get("anchor_data", {}))


class RealVideos(RolloutCache):
    """Real videos in the place of rollouts, one for each prompt (SRPO's offline mode)."""

    def __init__(self, data: AnchorData, batches: Batches):
        super().__init__(reuse=1)
        self.data, self.batches = data, batches

    def get(self, step: int, micro: int) -> torch.Tensor:
        """Return the latents of the batch's videos, at which an empty window starts."""
        return self.data.latents(self.batches.batch(step, micro).prompts)


def vae_identity(vae: AutoencoderKLWan) -> str:
    """Return a digest of the scale of latents, and of each weight's name, dtype and first values.

    So it takes no time, and is another one after any training of the VAE.
    """
    found = hashlib.sha256(repr((VERSION, vae.config.latents_mean, vae.config.latents_std)).encode())
    for name, weight in vae.state_dict().items():
        head = weight.flatten()[:VALUES_COMPARED].float().cpu().numpy().tobytes()
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode() + head)
    return found.hexdigest()[:16]


def _key(caption: str) -> tuple[str, str]:
    """Return a video's file and caption, which tell it from the others of its folder."""
    return row_of(caption)["file"], str(caption)
