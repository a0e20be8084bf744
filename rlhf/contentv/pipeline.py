"""ContentV's text-to-video pipeline: encode the prompt, denoise by `rlhf.generator.flow`, decode.

A subclass of `diffusers.StableDiffusion3Pipeline` for its prompt encoding and LoRA loading.
Shape legend: B batch, C channels, T latent frames, H W latent height and width.
"""

import json
import logging as python_logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from rlhf.contentv.facts import FAMILY
from rlhf.contentv.transformer import SD3Transformer3DModel
from rlhf.generator.flow import NUM_TRAIN_TIMESTEPS, euler_step, flow_sigmas, guided_velocity
from rlhf.generator.pipeline import VideoPipeline
from rlhf.generator.registry import SamplingDefaults
from rlhf.generator.wan_decoder import unnormalise
from rlhf.types import Conditioning

logger = logging.get_logger(__name__)

# Classes in a saved model_index.json, so that the published code loads it too. That code passes the
# transformer and the VAE in, checks them against the base class named here, and has transformers 4.
INDEX_CLASSES = {
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "tokenizer": ("transformers", "CLIPTokenizerFast"),
    "tokenizer_2": ("transformers", "CLIPTokenizerFast"),
    "tokenizer_3": ("transformers", "T5TokenizerFast"),
}

# Loggers, and the beginnings of their warnings of long prompts, which print a batch with padding.
PRINT_PADDING = {
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3": "The following part of your input was trunc",
    "transformers.tokenization_utils_base": "Token indices sequence length is longer",
}
# The results of `encode_prompt`, in its order.
EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


@dataclass
class ContentVPipelineOutput(BaseOutput):
    """The videos of a call.

    Attributes:
        frames: by output type. "np": (B, frames, height, width, 3) in [0, 1]; "pt": the same as
            (B, frames, 3, height, width); "pil": lists of images; "latent": (B, C, T, H, W).
    """

    frames: Any


class ContentVPipeline(VideoPipeline, StableDiffusion3Pipeline):
    """The text-to-video pipeline, made by `rlhf.generator.loading.load_pipeline`."""

    family = FAMILY
    _optional_components = []

    def __init__(
        self,
        transformer: SD3Transformer3DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLWan,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
        text_encoder_3: T5EncoderModel,
        tokenizer_3: T5TokenizerFast,
    ):
        DiffusionPipeline.__init__(self)  # the parent's __init__ reads a config that a Wan VAE does not have
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        )
        self.vae_scale_factor_temporal = 2 ** sum(vae.config.temperal_downsample)
        self.vae_scale_factor = 2 ** len(vae.config.temperal_downsample)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)
        self.tokenizer_max_length = tokenizer.model_max_length
        self.patch_size = transformer.config.patch_size
        self.sampling = SamplingDefaults()

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Write all components, sampling.json, and an index that the published code can read."""
        self.register_to_config(**INDEX_CLASSES)
        super().save_pretrained(save_directory, **kwargs)
        self.sampling.save(save_directory)
        for config in Path(save_directory).glob("tokenizer*/tokenizer_config.json"):
            _write_transformers4_key(config)

    def encode_prompt(self, *args, **kwargs) -> tuple[torch.Tensor | None, ...]:
        """Return the four embeddings, as the parent does; `warn_of_truncation` names long ones."""
        with ExitStack() as stack:
            for name, beginning in PRINT_PADDING.items():
                other = python_logging.getLogger(name)
                keep = lambda record, beginning=beginning: not record.getMessage().startswith(beginning)
                other.addFilter(keep)
                stack.callback(other.removeFilter, keep)
            return super().encode_prompt(*args, **kwargs)

    def encode_part(self, encoder: str, texts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, ...]:
        """Return T5's embeddings, or a CLIP's and its pooled ones, as `encode_prompt` does."""
        module, tokenizer = getattr(self, encoder), getattr(self, encoder.replace("text_encoder", "tokenizer"))
        is_t5 = encoder == self.family.longest_encoder
        length = max_sequence_length if is_t5 else self.tokenizer_max_length
        ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        found = module(ids.to(module.device), output_hidden_states=not is_t5)
        return (found[0],) if is_t5 else (found.hidden_states[-2], found[0])

    def join_parts(self, parts: dict[str, tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both CLIPs' embeddings side by side, then T5's; and the CLIPs' pooled ones."""
        (first, pooled), (second, pooled_2), (t5,) = (parts[name] for name in self.family.text_encoders)
        clip = torch.cat([first, second], -1)
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, t5], -2), torch.cat([pooled, pooled_2], -1)

    def warn_of_truncation(self, prompts: list[str], max_sequence_length: int) -> None:
        """Log one line if CLIP or T5 reads some of the prompts only in part."""
        read = (self.tokenizer, self.tokenizer_max_length), (self.tokenizer_3, max_sequence_length)
        clip, t5 = ([len(ids) - limit for ids in t(prompts, verbose=False).input_ids] for t, limit in read)
        if max(clip + t5) > 0 and os.environ.get("RANK", "0") == "0":
            more, prompt = max(zip(t5, prompts, strict=True))
            logger.warning(
                f"Of {len(prompts)} texts, {sum(n > 0 for n in clip)} are longer than the {read[0][1]} tokens that "
                f"CLIP reads, and {sum(n > 0 for n in t5)} than T5's {max_sequence_length} (max_sequence_length). The "
                f"longest has {more + max_sequence_length} tokens of T5: {prompt[:60]!r}"
            )

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int = 16,
        height: int = 432,
        width: int = 768,
        num_frames: int = 125,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return noise (B, C, 1 + (num_frames-1)/4, height/8, width/8), or `latents` cast."""
        if latents is not None:
            return latents.to(device=device, dtype=dtype)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator: got {len(generator)} generators for a batch of {batch_size} videos, expected one or one "
                "per video; pass as many"
            )
        num_latent_frames = (num_frames - 1) // self.vae_scale_factor_temporal + 1
        size = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        shape = (batch_size, num_channels_latents, num_latent_frames, *size)
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        prompt_3: str | list[str] | None = None,
        height: int = 432,
        width: int = 768,
        num_frames: int = 125,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        negative_prompt_3: str | list[str] | None = None,
        num_videos_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str | None = "np",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - as in every diffusers pipeline
        max_sequence_length: int = 256,
    ) -> ContentVPipelineOutput | tuple:
        """Generate videos.

        Defaults are ContentV-8B's; `pipe.sampling.call_arguments()` has this checkpoint's.

        Args:
            prompt: the text; `prompt_2` and `prompt_3` replace it for the second CLIP and for T5.
            height, width: pixels, divisible by 16 (8 of the VAE times the patch size 2).
            num_frames: 4k + 1; other numbers are rounded, with a warning.
            guidance_scale: at 1 or less there is no guidance, and half the time a step.
            negative_prompt: text to steer away from; default: empty. `_2`, `_3` as for the prompt.
            generator: draws the initial noise; a list has one per video.
            latents: initial noise (B, C, T, H, W), instead of drawn noise.
            prompt_embeds, pooled_prompt_embeds: (B, L, D) and (B, P) instead of text, as negatives.
            output_type: "np", "pt", "pil" or "latent"; see `ContentVPipelineOutput`.
            joint_attention_kwargs: `{"scale": s}` scales LoRA adapters.
            clip_skip: number of last CLIP layers to leave out.
            callback_on_step_end: called as (pipe, step, timestep, tensors) after each step; may
                return replacements of the tensors.
            max_sequence_length: T5 tokens, at most 512.

        Raises:
            ValueError: inputs that contradict each other or have a wrong size.
        """
        text = {"prompt": prompt, "prompt_2": prompt_2, "prompt_3": prompt_3, "negative_prompt": negative_prompt}
        text |= {"negative_prompt_2": negative_prompt_2, "negative_prompt_3": negative_prompt_3}
        embeds = (prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds)
        text |= dict(zip(EMBEDS, embeds, strict=True)) | {"max_sequence_length": max_sequence_length}
        asked = callback_on_step_end_tensor_inputs
        self.check_inputs(height=height, width=width, callback_on_step_end_tensor_inputs=asked, **text)
        self._guidance_scale, self._clip_skip, self._interrupt = guidance_scale, clip_skip, False
        self._joint_attention_kwargs = joint_attention_kwargs
        tensors = self._encode(text, num_videos_per_prompt)
        size = (self.transformer.config.in_channels, height, width, self._round_num_frames(num_frames))
        where = (torch.float32, self._execution_device)
        tensors["latents"] = self.prepare_latents(len(tensors["prompt_embeds"]), *size, *where, generator, latents)
        latents = self._denoise(tensors, num_inference_steps, callback_on_step_end, asked)
        frames = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ContentVPipelineOutput(frames=frames) if return_dict else (frames,)

    def _encode(self, text: dict[str, Any], num_videos_per_prompt: int | None) -> dict[str, torch.Tensor]:
        """Return the embeddings by name; `text` has arguments of `encode_prompt`."""
        if prompt := text["prompt"]:
            self.warn_of_truncation([prompt] if isinstance(prompt, str) else prompt, text["max_sequence_length"])
        embeds = self.encode_prompt(
            **text,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            device=self._execution_device,
            clip_skip=self.clip_skip,
            num_images_per_prompt=num_videos_per_prompt,
            lora_scale=(self.joint_attention_kwargs or {}).get("scale"),
        )
        return dict(zip(EMBEDS, embeds, strict=True))

    def _round_num_frames(self, num_frames: int) -> int:
        """Return num_frames rounded to 4k + 1, with a warning if that changes the number."""
        factor = self.vae_scale_factor_temporal
        rounded = max(num_frames if num_frames % factor == 1 else num_frames // factor * factor + 1, 1)
        if rounded != num_frames:
            logger.warning(f"num_frames={num_frames} is not {factor}k + 1; {rounded} frames will be made")
        return rounded

    def _denoise(self, tensors: dict[str, torch.Tensor], num_steps: int, callback, callback_inputs) -> torch.Tensor:
        """Return the denoised latents; tensors has the noise and the embeddings by name."""
        sigmas = flow_sigmas(self.scheduler, num_steps, tensors["latents"].device)
        self._num_timesteps = num_steps
        with self.progress_bar(total=num_steps) as progress:
            for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
                if self.interrupt:
                    break
                text, negative, pooled, negative_pooled = (tensors[name] for name in EMBEDS)
                cond, x = Conditioning(text, pooled, negative, negative_pooled), tensors["latents"]
                v = guided_velocity(self.transformer, x, sigma, cond, self.guidance_scale, self.joint_attention_kwargs)
                tensors["latents"] = euler_step(x, v, sigma, sigma_next)
                if callback is not None:
                    asked = {key: tensors[key] for key in callback_inputs}
                    tensors |= callback(self, i, sigma * NUM_TRAIN_TIMESTEPS, asked) or {}
                progress.update()
        return tensors["latents"]

    def _decode(self, latents_BCTHW: torch.Tensor, output_type: str):
        """Return the frames of normalised latents, as `ContentVPipelineOutput` has them."""
        # Stock decode, not decode_video: no gradient is needed, and tiling, slicing and offloading
        # keep working.
        latents = unnormalise(self.vae, latents_BCTHW).to(self.vae.dtype)
        video = self.vae.decode(latents, return_dict=False)[0]
        return self.video_processor.postprocess_video(video.float(), output_type=output_type)


def _write_transformers4_key(config: Path) -> None:
    """Rename a key of a tokenizer's config so that transformers 4 reads it, too.

    transformers 5 writes a list under `extra_special_tokens`, where transformers 4 expects a dict.
    Both read the older key.
    """
    values = json.loads(config.read_text())
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
        config.write_text(json.dumps(values, indent=2) + "\n")
