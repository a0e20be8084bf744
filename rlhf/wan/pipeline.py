"""Wan 2.1's text-to-video pipeline: diffusers' own, sampled by Euler steps as in training."""

import os
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils import logging

from rlhf.generator.pipeline import VideoPipeline
from rlhf.wan.facts import FAMILY

logger = logging.get_logger(__name__)


class EulerFlowScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler steps whose sigmas fall evenly from 1 to 0 before the shift.

    The parent's own end with a step from almost 0 to 0, which does next to nothing.
    """

    def set_timesteps(self, num_inference_steps: int | None = None, device=None, sigmas=None, **kwargs) -> None:
        """Set the sigmas of `num_inference_steps`, or the given ones."""
        if sigmas is None and num_inference_steps is not None:
            sigmas = np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1]
        super().set_timesteps(device=device, sigmas=sigmas, **kwargs)


class WanPipeline(VideoPipeline, diffusers.WanPipeline):
    """The text-to-video pipeline, made by `rlhf.generator.loading.load_pipeline`."""

    family = FAMILY
    sampling = FAMILY.sampling

    @property
    def tokenizer_max_length(self) -> int:
        """Tokens that UMT5's tokenizer is made for."""
        return self.tokenizer.model_max_length

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of the video along an edge of one latent pixel."""
        return self.vae_scale_factor_spatial

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Write all components, sampling.json, and an index of diffusers' own classes."""
        index = {"transformer": "WanTransformer3DModel", "scheduler": "FlowMatchEulerDiscreteScheduler"}
        self.register_to_config(**{name: ("diffusers", cls) for name, cls in index.items()})
        super().save_pretrained(save_directory, **kwargs)
        self.sampling.save(save_directory)

    def encode_part(self, encoder: str, texts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, ...]:
        """Return UMT5's embeddings, zero behind each text's tokens."""
        embeds, _ = self.encode_prompt(
            texts,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
            device=getattr(self, encoder).device,
        )
        return (embeds,)

    def join_parts(self, parts: dict[str, tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return UMT5's embeddings, and pooled ones of width 0."""
        ((embeds,),) = parts.values()
        return embeds, embeds.new_empty(len(embeds), 0)

    def warn_of_truncation(self, prompts: list[str], max_sequence_length: int) -> None:
        """Log one line if UMT5 reads some of the prompts only in part."""
        cleaned = [prompt_clean(prompt) for prompt in prompts]
        more = [len(ids) - max_sequence_length for ids in self.tokenizer(cleaned, verbose=False).input_ids]
        if max(more) > 0 and os.environ.get("RANK", "0") == "0":
            longest, prompt = max(zip(more, cleaned, strict=True))
            logger.warning(
                f"Of {len(prompts)} texts, {sum(n > 0 for n in more)} are longer than UMT5's {max_sequence_length} "
                f"tokens (max_sequence_length). The longest has {longest + max_sequence_length}: {prompt[:60]!r}"
            )
