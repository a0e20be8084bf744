"""Videos one by one, of a model with or without an adapter, on large and on small devices.

Text encoders, transformer and decoder need not be on the device together, nor all of the
transformer: `Placement` says what is there when. The video is the same up to rounding.

Shape legend: B batch, C channels, T frames, H height, W width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from rlhf.adapter.lora_weights import Lora
from rlhf.adapter.merge import apply_lora
from rlhf.execution.apply import ExecutionOptions, set_up_blocks
from rlhf.execution.offload import visit_device
from rlhf.generator.files import SamplingDefaults
from rlhf.generator.flow import euler_step, flow_sigmas, guided_velocity
from rlhf.generator.loading import load_pipeline
from rlhf.generator.pipeline import VideoPipeline
from rlhf.generator.text import encode_prompts
from rlhf.generator.wan_decoder import decode_video
from rlhf.run.video import finished_video

TEXTS = 2  # the prompt and the negative prompt, which are encoded as one batch


@dataclass(frozen=True)
class Placement:
    """Places of a model's parts while it samples.

    Attributes:
        encoders: "device" for all the time; "in turn": each is on the device for its own call
            alone, when nothing else is there; "host": they run on the CPU.
        stream_weights: the transformer's blocks stay in host memory and are copied one by one.
    """

    encoders: Literal["device", "in turn", "host"] = "device"
    stream_weights: bool = False

    def __str__(self) -> str:
        blocks = "streamed from host memory" if self.stream_weights else "on the device"
        where = {"device": "on the device", "in turn": "on the device in turn", "host": "on the CPU"}[self.encoders]
        return f"text encoders {where}, transformer {blocks}, frames decoded latent by latent"


class Sampler:
    """A loaded model that makes one video at a time.

    Raises ValueError as `load_pipeline` does.
    """

    def __init__(self, model: str, device: torch.device, placement: Placement | None = None):
        self.device, self.placement = device, placement or Placement()
        self.is_whole = self.placement.encoders == "device"
        self.pipe: VideoPipeline = load_pipeline(model, device=device if self.is_whole else None)
        self.text, self.is_set_up = {}, False

    def use(self, lora: Lora | None, scale: float = 1.0) -> str:
        """Replace the adapter by another, or by none; return a line on how much it changes."""
        transformer = self.pipe.transformer
        if getattr(transformer, "peft_config", None):
            transformer.unload_lora()
        if lora is None:
            return ""
        line = apply_lora(transformer, lora, scale)
        if self.is_set_up:
            for name, p in transformer.named_parameters():
                if "lora_" in name:  # peft puts it beside the weight, which may be in host memory
                    p.data = p.data.to(self.device)
        return line

    @torch.no_grad()
    def sample(
        self, prompt: str, seed: int, sampling: SamplingDefaults, on_step: Callable[[int], None] = lambda done: None
    ) -> torch.Tensor:
        """Return the video of a prompt, uint8 (T, 3, H, W) on the CPU.

        on_step: called with the number of steps done, also before the first. What it raises ends
        the sampling.
        """
        on_step(0)
        cond = self._encode(prompt, sampling).to(self.device)
        pipe, transformer = self.pipe, self.pipe.transformer
        self._set_up()
        noise = torch.Generator().manual_seed(seed)
        size = transformer.config.in_channels, sampling.height, sampling.width, sampling.num_frames
        x = pipe.prepare_latents(1, *size, torch.float32, self.device, noise)
        sigmas = flow_sigmas(pipe.scheduler, sampling.num_inference_steps, self.device)
        for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            v = guided_velocity(transformer, x, sigma, cond, sampling.guidance_scale)
            x = euler_step(x, v, sigma, sigma_next)
            on_step(i + 1)
        pipe.vae.to(self.device)
        video = finished_video(decode_video(pipe.vae, x, sampling.num_frames, chunk=1)[0].transpose(0, 1))
        if not self.is_whole:
            pipe.vae.to("cpu")
        return video

    def _encode(self, prompt: str, sampling: SamplingDefaults):
        """Return the conditioning of a prompt, on the CPU; that of the last prompt is kept."""
        key = prompt, sampling.negative_prompt, sampling.max_sequence_length
        if key not in self.text:
            if self.placement.encoders == "in turn" and self.is_set_up and not self.placement.stream_weights:
                self.pipe.transformer.to("cpu")
                self.is_set_up = False
            lend = self._lend_encoder if self.placement.encoders == "in turn" else nullcontext
            text = encode_prompts(self.pipe, [prompt], *key[1:], batch=TEXTS, lend_encoder=lend)
            self.text = {key: text([prompt], "cpu")}
        return self.text[key]

    def _lend_encoder(self, name: str) -> AbstractContextManager:
        """Return a context inside of which a text encoder is on the device."""
        return visit_device(getattr(self.pipe, name), self.device)

    def _set_up(self) -> None:
        """Move the transformer to the device, or stream its weights; only in the first call."""
        if not self.is_set_up:
            options = ExecutionOptions(stream_weights=self.placement.stream_weights)
            set_up_blocks(self.pipe.transformer, options, self.device)
            self.is_set_up = True
