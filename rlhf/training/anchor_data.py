"""Real videos in the loop: latents cached once, a flow-matching loss, starts without a rollout.

Shape legend: B batch, C channels, T latent frames, H W latent height and width, L text tokens, D
text width, P pooled text width.
"""

import hashlib

import torch
from safetensors import safe_open
from torch import nn

from rewards.cli.files import read_video
from rewards.score_cache import content_sha256, digest
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

VERSION = "1"  # to be raised when latents of a file change
VALUES_COMPARED = 64  # of each weight of a model


class AnchorData:
    """A run's real videos: their order, their latents, and the loss that holds the model to them.

    Latents and embeddings of a caption are a safetensors file in `entry_folder`. Its name has size
    and frame rate, and a digest of the VAE, the text encoders and the caption.
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
        self.videos, self.vae, self.layout = videos, pipe.vae, layout
        self.every, self.shift = max(1, options.anchor_data_steps), pipe.scheduler.config.shift
        self.size, self.captions = clip_size(args, pipe.sampling.fps), [video.prompt for video in videos]
        self.files = {}
        if videos:
            encoders = [getattr(pipe, name) for name in pipe.family.text_encoders]
            models = [model_identity(module) for module in (pipe.vae, *encoders)]
            models += [VERSION, str(pipe.vae.config.latents_mean), str(pipe.vae.config.latents_std)]
            for video in videos:
                key = digest(*models, str(args.max_sequence_length), str(video.prompt))[:16]
                self.files[_key(video.prompt)] = (
                    entry_folder(content_sha256(video.path)) / f"{self.size}-{key}.safetensors"
                )
        size, per_step = args.per_device_train_batch_size, args.gradient_accumulation_steps
        self.batches = Batches(
            self.captions, noise_shape_CTHW, layout, args.seed, size, per_step, self.every, args.max_steps
        )

    def embeddings(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return the cached embeddings (L, D) and pooled ones (P,), by caption."""
        there = [caption for caption in self.captions if self.files[_key(caption)].is_file()]
        return {str(caption): self._load(caption, "prompt_embeds", "pooled_embeds") for caption in there}

    def complete(self, text: PromptCache) -> None:
        """Encode the videos that the cache lacks; all processes share the work.

        Each is written whole, so that an interrupted start goes on where it was. text: has the
        captions.
        """
        processes = self.layout.accelerator
        shares = self.videos[processes.process_index :: processes.num_processes], self.videos
        for share in shares:  # then what another host encoded into a cache of its own
            missing = [video for video in share if not self.files[_key(video.prompt)].is_file()]
            with progress_bar("encode", "video", len(missing), processes.is_main_process and bool(missing)) as bar:
                for video in missing:
                    self._encode(video, text)
                    bar.update()
            processes.wait_for_everyone()

    def _encode(self, video: Video, text: PromptCache) -> None:
        pixels = read_video(video.path, self.size.num_frames, self.size.fps).pixels_BCTHW
        cond = text([video.prompt], "cpu")
        tensors = {"latents": encode_video(self.vae, pixels.to(self.layout.device))[0]}
        tensors |= {"prompt_embeds": cond.prompt_embeds_BLD[0], "pooled_embeds": cond.pooled_embeds_BP[0]}
        about = {"file": row_of(video.prompt)["file"], "caption": str(video.prompt)}
        save_tensors(self.files[_key(video.prompt)], tensors, about, shared=True)

    def _load(self, caption: str, *names: str) -> tuple[torch.Tensor, ...]:
        path = self.files[_key(caption)]
        with file_errors(path), safe_open(path, "pt") as file:
            return tuple(file.get_tensor(name) for name in names)

    def latents(self, captions: list[str]) -> torch.Tensor:
        """Return the latents (B, C, T, H, W) of the videos with these captions, on the device."""
        return torch.stack([self._load(caption, "latents")[0] for caption in captions]).to(self.layout.device)

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
        """Continue from a checkpoint's state."""
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


def model_identity(module: nn.Module) -> str:
    """Return a digest of each weight's name, shape, dtype and first values.

    So it takes no time, and is another one after any training of the module.
    """
    found = hashlib.sha256()
    for name, weight in module.state_dict().items():
        head = weight.flatten()[:VALUES_COMPARED].float().cpu().numpy().tobytes()
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode() + head)
    return found.hexdigest()


def _key(caption: str) -> tuple[str, str]:
    """Return what tells a video from the others of its folder."""
    return row_of(caption)["file"], str(caption)
