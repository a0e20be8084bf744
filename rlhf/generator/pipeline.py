"""What the trainer needs of a generator's pipeline, besides diffusers' own."""

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler

from rlhf.generator.registry import ModelFamily, SamplingDefaults


class VideoPipeline:
    """A text-to-video pipeline that can be trained, made by `rlhf.generator.loading.load_pipeline`.

    A call takes prompts and `SamplingDefaults.call_arguments`, and returns videos. Latents are
    (B, C, 1 + (frames-1)/vae_scale_factor_temporal, height/vae_scale_factor, width/...).
    """

    family: ModelFamily
    sampling: SamplingDefaults  # of the checkpoint
    transformer: torch.nn.Module
    vae: AutoencoderKLWan
    scheduler: FlowMatchEulerDiscreteScheduler  # for `rlhf.generator.flow.flow_sigmas`
    tokenizer_max_length: int
    vae_scale_factor: int
    vae_scale_factor_temporal: int

    def encode_part(self, encoder: str, texts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, ...]:
        """Return what one text encoder, by its name, makes of texts; each tensor is (B, ...)."""
        raise NotImplementedError

    def join_parts(self, parts: dict[str, tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return embeddings (B, L, D) and pooled embeddings (B, P); P is 0 for a model without.

        parts: of `encode_part`, by encoder.
        """
        raise NotImplementedError

    def warn_of_truncation(self, prompts: list[str], max_sequence_length: int) -> None:
        """Log one line if an encoder reads some of the prompts only in part."""
        raise NotImplementedError
