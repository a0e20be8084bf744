"""The test of `python -m rlhf.device --check`: train nano on a device and compare with the CPU.

The test samples two videos, takes a reward's gradient through all denoising steps, does an
optimizer step, and saves and restores the state. The reference is float32 on the CPU. Shape legend:
B batch, C channels, T latent frames, H W latent height and width.
"""

import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig

from rewards import load_reward
from rewards.cli.table import format_table
from rlhf.adapter.lora import ATTENTION, add_adapter
from rlhf.adapter.masters import MasterWeights
from rlhf.device import describe, deterministic, peak_memory, reset_peak_memory, time_call
from rlhf.generator.flow import euler_step, flow_sigmas, guided_velocity
from rlhf.generator.loading import load_pipeline
from rlhf.generator.text import encode_prompts
from rlhf.generator.wan_decoder import decode_video
from rlhf.io import write_json
from rlhf.method.rollout import draw_noise
from rlhf.run.checkpoint import load_checkpoint, save_checkpoint
from rlhf.training.setup import latent_shape

PROMPTS = ["a large red circle moving left on a white background", "two small blue stars growing on a black background"]
SEED, RANK, LEARNING_RATE = 0, 8, 1e-3
# Largest allowed |x - cpu| / |cpu| (Euclidean norms) by number format and phase. float32 leaves
# room for sums in another order; bfloat16 is twice the difference of bfloat16 on the CPU. "step" is
# AdamW on the CPU's gradient, in float32 for both; "restore" and "repeat" compare a device with
# itself.
TOLERANCES = {
    "float32": {"forward": 1e-4, "gradient": 1e-3, "step": 1e-4, "restore": 0.0, "repeat": 1e-5},
    "bfloat16": {"forward": 5e-2, "gradient": 1e-1, "step": 1e-4, "restore": 0.0, "repeat": 1e-2},
}


@dataclass(frozen=True)
class Row:
    """A row of the table: a phase, its time, and the distance of its result from the reference."""

    arm: str  # number format of transformer and text encoders
    frames: int  # of each video
    phase: str
    seconds: float
    peak_gib: float  # peak memory so far, of the device or of the process on a CPU
    difference: float  # |x - reference| / |reference|
    tolerance: float

    @property
    def passed(self) -> bool:
        """Return whether the difference is within the tolerance."""
        return self.difference <= self.tolerance  # False for NaN


class Training:
    """The nano model with an adapter on a device, trained phase by phase."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.pipe, self.device = load_pipeline("nano", dtype, device), device
        sampling = self.sampling = self.pipe.sampling
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ATTENTION, init_lora_weights=False)
        add_adapter(self.pipe.transformer, config, SEED)
        _shrink_lora_b(self.pipe.transformer)
        self.masters = MasterWeights(self.pipe.transformer)
        self.optimizer = torch.optim.AdamW([self.masters.vector], lr=LEARNING_RATE, fused=True)
        self.reward = load_reward("nano_preference").to(device).requires_grad_(False).eval()
        text = encode_prompts(self.pipe, PROMPTS, sampling.negative_prompt, sampling.max_sequence_length)
        self.cond = text(PROMPTS, device)
        keys = [(i,) for i in range(len(PROMPTS))]
        self.noise = draw_noise(latent_shape(self.pipe, sampling), SEED, "check", keys).to(device)
        self.sigmas = flow_sigmas(self.pipe.scheduler, sampling.num_inference_steps, device)

    def latents(self) -> torch.Tensor:
        """Return float32 latents (B, C, T, H, W) after all denoising steps."""
        x, guidance = self.noise, self.sampling.guidance_scale
        for sigma, sigma_next in zip(self.sigmas[:-1], self.sigmas[1:], strict=True):
            v = guided_velocity(self.pipe.transformer, x, sigma, self.cond, guidance)
            x = euler_step(x, v, sigma, sigma_next)
        return x

    def gradient(self) -> torch.Tensor:
        """Return the gradient of minus the mean score at the masters, one float32 vector."""
        self.masters.vector.grad.zero_()
        video = decode_video(self.pipe.vae, self.latents())
        (-self.reward(video, PROMPTS).mean()).backward()
        self.masters.collect_grad()
        return self.masters.vector.grad.clone()

    def step(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the change of the masters by an optimizer step on this gradient."""
        before = self.masters.vector.detach().clone()
        self.masters.vector.grad.copy_(gradient)
        self.optimizer.step()
        self.masters.write()
        return self.masters.vector.detach() - before

    def restore(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the masters after a step from a restored checkpoint, and after the original."""
        with tempfile.TemporaryDirectory() as folder:
            saved = save_checkpoint(Path(folder), 1, self.masters, self.optimizer, {"settings": {}})
            self.step(gradient)
            first = self.masters.vector.detach().clone()
            load_checkpoint(saved, self.masters, self.optimizer)
            self.step(gradient)
        return self.masters.vector.detach(), first


@torch.no_grad()
def _shrink_lora_b(transformer) -> None:
    """Make the random B matrices small, so that A has a gradient and the model is near its base."""
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter *= 0.1


def check_device(device: torch.device, dtypes: list[str]) -> list[Row]:
    """Return a row for each number format and phase. The reference is float32 on the CPU."""
    with deterministic(torch.device("cpu")), deterministic(device):
        reference = Training(torch.device("cpu"), torch.float32)
        with torch.no_grad():
            expected = {"forward": reference.latents()}
        expected["gradient"] = reference.gradient()
        expected["step"] = reference.step(expected["gradient"])
        return [row for dtype in dtypes for row in _check_dtype(device, dtype, expected)]


def _check_dtype(device: torch.device, dtype: str, expected: dict[str, torch.Tensor]) -> list[Row]:
    """Return the rows of one number format; expected holds the CPU's results by phase."""
    training, rows = Training(device, getattr(torch, dtype)), []
    expected_gradient, frames = expected["gradient"].to(device), training.sampling.num_frames
    reset_peak_memory(device)

    def measure(phase: str, work: Callable, reference: torch.Tensor | None = None) -> torch.Tensor:
        """Add a row; without a reference, work returns (result, reference)."""
        results = []
        seconds = time_call(lambda: results.append(work()), device)
        result, reference = results[0] if reference is None else (results[0], reference)
        difference, peak = distance(result, reference), peak_memory(device) / 2**30
        rows.append(Row(dtype, frames, phase, seconds, peak, difference, TOLERANCES[dtype][phase]))
        return result

    with torch.no_grad():
        training.latents()  # warm-up: the first call loads kernels
        measure("forward", training.latents, expected["forward"])
    gradient = measure("gradient", training.gradient, expected["gradient"])
    measure("repeat", training.gradient, gradient)
    measure("step", lambda: training.step(expected_gradient), expected["step"])
    measure("restore", lambda: training.restore(expected_gradient))
    return rows


def distance(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Return |result - reference| / |reference|, Euclidean norms, in float64 on the CPU."""
    result, reference = (x.detach().cpu().double() for x in (result, reference))
    return ((result - reference).norm() / reference.norm()).item()


def table(rows: list[Row]) -> str:
    """Format the rows as a text table."""
    cells = [("format", "phase", "seconds", "GiB", "difference", "tolerance", "")]
    for row in rows:
        numbers = f"{row.seconds:.3f}", f"{row.peak_gib:.2f}", f"{row.difference:.1e}", f"{row.tolerance:.0e}"
        cells.append((row.arm, row.phase, *numbers, "ok" if row.passed else "FAILED"))
    return format_table(cells)


def write_rows(path: Path, device: torch.device, rows: list[Row]) -> None:
    """Write the rows and the environment that they were measured in as JSON."""
    environment = {
        "device": str(device),
        "name": describe(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "reference": "float32 on the CPU",
    }
    listed = [asdict(row) | {"passed": row.passed} for row in rows]
    write_json(path, {"environment": environment, "rows": listed})
