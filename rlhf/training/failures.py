"""Errors that end a training, each explained in one paragraph."""

import math
import traceback
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

import rlhf
from rewards import RewardError, RewardMix
from rlhf.distributed.accelerator import any_process


class TrainingError(RuntimeError):
    """Training cannot go on: why, and what to do. checkpoints/ holds the last good step."""


class SkippedSteps:
    """Counter of skipped optimizer steps in a row; `limit` of them are tolerated."""

    def __init__(self, limit: int):
        self.limit, self.in_a_row = limit, 0

    def add(self, error: Exception) -> dict:
        """Count a skipped step and return what to log of it. Raises the error beyond the limit."""
        if self.in_a_row == self.limit:
            raise error
        self.in_a_row += 1
        return {"skipped": self.in_a_row, "why": str(error)}


def require_untrained(trained: bool) -> None:
    """Raise TrainingError if the trainer has trained before: its adapter is no longer new."""
    if trained:
        raise TrainingError(
            "train() was called again, expected one call a trainer. Make a new one: with "
            "resume_from_checkpoint='latest' to go on, else with another output_dir or overwrite_output_dir. A "
            "pipeline that was handed over keeps its adapter until pipe.unload_lora_weights()."
        )


def non_finite_error(
    scores: torch.Tensor,
    norm: float,
    error: RewardError | None,
    rewards: RewardMix,
    suspect: tuple[torch.Tensor, list[str], dict] | None,
    accelerator: Accelerator,
) -> Exception | None:
    """Return the error of a step whose scores or gradient norm are not finite, or None.

    It is an error on all processes or on none; its words may differ.

    Args:
        scores: of all processes.
        norm: of the gradient, summed over processes.
        error: raised by a reward on this process.
        suspect: video, prompts and info of the sample after which this process's gradient was no
            longer finite; None if it is.
    """
    if not torch.isfinite(scores).all():
        return error or TrainingError("A reward failed on another process; its message says which and why.")
    if math.isfinite(norm):
        return None
    broken = broken_rewards(rewards, *suspect) if suspect else {}
    trained = [name for name, weight in rewards.weights.items() if weight]
    guilty = [name for name in trained if any_process(accelerator, broken.get(name, False))]
    source = f"the reward {', '.join(guilty)}" if guilty else "no reward, so the decoder or the transformer"
    return TrainingError(
        f"The gradient at the adapter has norm {norm}, expected a finite number; it comes from {source}. Look for "
        "sqrt, norm or log at zero there, lower learning_rate, use dtype float32, or pass over single steps with "
        "max_skipped_steps."
    )


def require_gradient(norm: float, step: int, rewards: RewardMix, logged: Collection[str]) -> None:
    """Raise TrainingError for a gradient norm of 0 in a step with a reward; drift may be 0."""
    if norm == 0 and "reward" in logged and not rewards.caps:  # none beyond a cap
        raise TrainingError(
            f"The gradient at the adapter is exactly zero after {step} steps, expected a number "
            "above 0: nothing would be learnt. Look for a reward that is saturated on these videos."
        )


def broken_rewards(
    rewards: RewardMix, video_BCTHW: torch.Tensor | None, prompts: list[str], info: dict
) -> dict[str, bool]:
    """Return {trained reward: whether its gradient at its input has NaN or infinity}.

    video_BCTHW: None if no reward scores videos. info: with the `latents` that `RewardMix` takes.
    """
    broken = {}
    for name in (name for name, weight in rewards.weights.items() if weight):
        mix, told = RewardMix({name: rewards.rewards[name]}), dict(info)
        x = (info["latents"].latents_BCTHW if mix.latent_rewards else video_BCTHW).clone().requires_grad_()
        if mix.latent_rewards:
            told["latents"] = replace(info["latents"], latents_BCTHW=x)
        scores_B, _ = mix(x, prompts, **told)
        broken[name] = not bool(torch.isfinite(torch.autograd.grad(scores_B.sum(), x)[0]).all())
    return broken


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
MEMORY_CURES = {  # folder or file of the failed allocation -> settings to change, in this order
    "rewards": "fewer num_frames, a smaller chunk or dtype bfloat16 in reward_kwargs",
    "wan_decoder.py": "decode_chunk 1 with decode_checkpoint and decode_caches host, vae_dtype bfloat16",
    "frozen_layers.py": "decode_chunk 1 with decode_checkpoint and decode_caches host, vae_dtype bfloat16",
    "held_out.py": "per_device_eval_batch_size 1 and decode_chunk 1",
    "loading.py": "stream_weights, or base_bits 4",
    "": "gradient_checkpointing, stepwise_backward, decode_chunk 1 with decode_checkpoint, smaller batches or videos",
}


def out_of_memory(error: Exception) -> str | None:
    """Explain an out-of-memory error by where it was raised; None for any other error."""
    if not any(words in str(error) for words in OUT_OF_MEMORY):
        return None
    root = Path(rlhf.__file__).parents[1]
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    inside = [file.relative_to(root) for file in files if file.is_relative_to(root)]
    ours = [file for file in inside if file.parts[0] in ("rlhf", "rewards")]
    parts = {part for file in ours for part in (file.name, file.parts[0])}
    cure = next(cure for place, cure in MEMORY_CURES.items() if place in parts or not place)
    where = f" in {ours[-1].as_posix()}" if ours else ""
    got = " ".join(str(error).split())[:200]
    return f"Out of memory{where}: {got}. Try, in this order: {cure}. docs/troubleshooting.md has more."
