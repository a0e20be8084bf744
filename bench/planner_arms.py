"""Settings of the runs that bench/planner.py compares."""

from pathlib import Path

import scale_arms
from step_arms import EXACT, ROOMY, SIZES, SMALL

STEPS = 25  # of denoising, at full size
LOW = {"gradient_checkpointing": True, "decode_chunk": 1, "decode_checkpoint": True}
NANO = {
    "nano, batch 16": {},
    "nano, batch 4": {"per_device_train_batch_size": 4},
    "nano, batch 64": {"per_device_train_batch_size": 64},
    "nano, batch 16, K = 1": {"num_grad_steps": 1},
    "nano, batch 16, blocks and chunks recomputed": LOW,
    "nano, batch 64, step by step": {"per_device_train_batch_size": 64, "stepwise_backward": True},
    "nano, batch 16, 33 frames": {"num_frames": 33},
    "nano, batch 16, no guidance": {"guidance_scale": 1.0},
}
# Frames of the video, leading frames that are scored, settings.
FULL = {
    "8B, 9 frames, K = 2, first frame": (9, 1, ROOMY | {"num_grad_steps": 2}),
    "8B, 17 frames, blocks recomputed": (17, 17, ROOMY | {"gradient_checkpointing": True}),
    "8B, 17 frames, no guidance": (17, 1, ROOMY | {"guidance_scale": 1.0}),
    "8B, 33 frames, exact": (33, 33, EXACT),
    "8B, 33 frames, text branch only": (33, 33, EXACT | {"guidance_gradient": "text", "keep_attention": False}),
    "8B, 33 frames, 5 in a window": (33, 33, ROOMY | LOW | {"decode_window": 5, "decode_checkpoint": False}),
    "8B, 33 frames, 24 GiB": (33, 33, SMALL),
    "8B, 61 frames, exact, VAE in float32": (61, 61, EXACT | {"vae_dtype": "float32"}),
    "8B, 125 frames, exact": (125, 125, EXACT),
}
# Whole steps of bench/step.py that are compared.
STEP_ARMS = (
    "24 GiB",
    "exact",
    "exact, nothing twice",
    "exact, nothing twice, moved video",
    "exact, nothing twice, moved adapter",
    "exact, nothing twice, compiled",
    "exact, nothing twice, compiled, FlashAttention-3",
    "exact, nothing twice, compiled, FlashAttention-3, guidance together",
    "a quarter of the steps",
    "a quarter of the steps, rollouts used 4 times, FlashAttention-3",
    "srpo",
    "srpo, nothing twice",
    "srpo, offline",
    "srpo, offline, nothing twice",
    "leap_align",
    "leap_align, nothing twice",
    "leap_align, nothing twice, step by step",
    "adjoint_matching, last 4 steps",
    "adjoint_matching, last 4 steps, nothing twice",
    "adjoint_matching, nothing twice",
    "prfl, last step",
    "prfl, last step, nothing twice",
)
CAPS_GIB = {"8B, 33 frames, 24 GiB": 24}


def settings_of(arm: str, size: str) -> dict:
    """Return the settings of an arm that change memory or time."""
    if arm in NANO:
        settings = {"num_grad_steps": 4, "per_device_train_batch_size": 16, "eval_prompts": "none"} | NANO[arm]
        if size == "tiny":
            settings |= {"height": 16, "width": 16}
            settings["per_device_train_batch_size"] = min(2, settings["per_device_train_batch_size"])
        return settings
    frames, scored, changes = FULL[arm]
    return full_settings(frames, scored, STEPS, size) | changes


def settings_of_step(row: dict, head: Path) -> dict | None:
    """Return the settings of a row of bench/results/step.json; None if it is not compared.

    head: the file of the latent reward with which prfl was measured.
    """
    if row["arm"] not in STEP_ARMS:
        return None
    settings = full_settings(row["frames"], row["scored"], row["steps"]) | row["settings"]
    if settings.get("method") == "prfl":
        kwargs = {"path": str(head), "recompute": settings.get("gradient_checkpointing", False)}
        settings |= {"reward_funcs": ["latent_reward"], "reward_kwargs": {"latent_reward": kwargs}}
    return settings


def settings_of_layout(row: dict, about: dict) -> dict:
    """Return the settings of a row of bench/results/scale.json. about: its environment."""
    layout = scale_arms.SETTINGS | scale_arms.arms(row["devices"])[row["arm"]]
    return full_settings(row["frames"], about["scored"], row["steps"]) | layout


def full_settings(frames: int, scored: int, steps: int, size: str = "full") -> dict:
    """Return the settings of ContentV-8B with HPS v2.1, which scores 8 frames or the first."""
    of_reward = {"frames": "first" if scored == 1 else "all", "num_frames": 8}
    return {
        "height": SIZES[size].height,
        "width": SIZES[size].width,
        "max_sequence_length": 256,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": 6.0,
        "lora_rank": 32,
        "reward_funcs": ["hps_v2_1"],
        "reward_kwargs": {"hps_v2_1": of_reward},
        "eval_prompts": None,
    }
