"""Settings of earlier versions: where each of them moved, so that older runs can be read."""

from contextlib import suppress
from typing import Any

from rlhf.config.coerce import coerce

RENAMED = {"rollout_uses": "rollout_reuse"}
# Settings that are now keys of a mapping: the mapping, the key, and the default that they had.
MOVED = {
    "grad_steps": ("method_kwargs", "steps", None),
    "jump_steps": ("method_kwargs", "jump_steps", None),
    "num_draws": ("method_kwargs", "num_draws", 2),
    "align_sigmas": ("method_kwargs", "align_sigmas", [0.75, 0.96]),
    "align_delta": ("method_kwargs", "align_delta", 0.02),
    "relative_words": ("method_kwargs", "relative_words", None),
    "relative_strength": ("method_kwargs", "relative_strength", 0.2),
    "eval_height": ("eval_size", "height", None),
    "eval_width": ("eval_size", "width", None),
    "eval_num_frames": ("eval_size", "num_frames", None),
}
COMMAND_FLAGS = ("dry_run", "memory_limit_gib", "plan_device", "plan_processes")
_PEFT_CONFIG = "give the trainer peft_config=LoraConfig({}, ...) in Python"
# Settings that are gone: the value without effect, and the cure for any other.
REMOVED = {
    "second_order_prefix": (False, "prefix_steps alone takes fewer steps"),
    "optim": ("adamw_torch_fused", "leave it out: AdamW's moments are float32"),
    "guidance_every": (1, "prefix_steps saves more and loses less; or use the version that began the run"),
    "sampling_weights": ("own", "prefix_steps and rollout_reuse save more"),
    "train_blocks": (None, "adapt more layers by lora_target_modules, or use the version that began the run"),
    "num_train_prompts": (4096, "write the prompts into a file, and name it as prompts"),
    "drift_weighting": ("kl", "guidance_gradient distill alone weighs evenly; use the version that began the run"),
    "early_stopping_threshold": (0.0, "leave it out: any rise counts"),
    "lora_use_dora": (False, _PEFT_CONFIG.format("use_dora=True")),
    "lora_rank_pattern": (None, _PEFT_CONFIG.format("rank_pattern=...")),
    "lora_alpha_pattern": (None, _PEFT_CONFIG.format("alpha_pattern=...")),
    "decode_channels_last": (None, ""),  # no effect on results: the device decides
}
REMOVED_VALUES = {
    "base_bits": (8, "4, or stream_weights, which is exact"),
    "decode_caches": ("recompute", "host"),
}


def translate_old_settings(settings: dict[str, Any]) -> tuple[dict[str, Any], str, list[str]]:
    """Translate settings of an earlier version; return them, a notice and the problems.

    Returns:
        The settings; a paragraph that says which of them moved where, "" if none did; and a
        problem, with its cure, for each that was in use and is gone.
    """
    kept = {RENAMED.get(name, name): value for name, value in settings.items() if name not in _GONE}
    moved = {}
    for name, (target, key, default) in MOVED.items():
        if settings.get(name, default) not in (default, "none"):
            moved.setdefault(target, {})[key] = settings[name]
    for target, values in moved.items():
        with suppress(TypeError, ValueError):  # what is no mapping stays for the check of its type
            kept[target] = values | (coerce(kept.get(target), dict | None) or {})
    return kept, _paragraph(settings, moved), list(_problems(settings))


_GONE = {*MOVED, *COMMAND_FLAGS, *REMOVED}


def _paragraph(settings: dict, values: dict[str, dict]) -> str:
    """Return a paragraph on the settings that were renamed, moved or removed; "" for none."""

    def among(names) -> str:
        return ", ".join(name for name in names if name in settings)

    parts = [f"{old} is now {new}" for old, new in RENAMED.items() if old in settings]
    for target in dict.fromkeys(target for target, *_ in MOVED.values()):
        if moved := among(name for name in MOVED if MOVED[name][0] == target):
            parts.append(f"{moved}: now in {target}, here {values.get(target) or 'none of them set'}")
    if flags := among(COMMAND_FLAGS):
        parts.append(f"{flags}: now only flags of the train command")
    if removed := among(REMOVED):
        parts.append(f"{removed}: gone, without effect here")
    if parts and settings.get("guidance_gradient") == "distill" and "drift_weighting" not in settings:
        parts.append("guidance_gradient distill: now weighs all steps alike, where drift_weighting was kl by default")
    return f"These settings are of an earlier version. {'; '.join(parts)}." if parts else ""


def _problems(settings: dict):
    """Yield a problem for each removed setting or value that is in use."""
    if settings.get("dry_run"):
        yield "dry_run: got it among the settings, expected the flag --dry_run of the command; leave it out"
    for name, (_, cure) in REMOVED.items():
        unused = _value_without_effect(name, settings)
        if cure and (settings.get(name, unused) or None) != (unused or None):  # {} was as none
            yield f"{name}: got {settings[name]!r}, which this version no longer has, expected none; {cure}"
    for name, (value, cure) in REMOVED_VALUES.items():
        if settings.get(name) == value:
            yield f"{name}: got {value!r}, which this version no longer has; choose {cure}"


def _value_without_effect(name: str, settings: dict) -> Any:
    """Return the value of a removed setting that changes nothing beside the other settings."""
    if name == "drift_weighting" and settings.get("guidance_gradient") == "distill":
        return "even"
    if name == "num_train_prompts" and settings.get("prompts", "nano_train") != "nano_train":  # a file was used whole
        return settings.get(name)
    return REMOVED[name][0]


def hint(name: str) -> str:
    """Return where a setting of an earlier version went; "" for any other name."""
    if name in RENAMED:
        return f"it is now {RENAMED[name]!r}"
    if name in MOVED:
        target, key, _ = MOVED[name]
        return f"it moved to {target}, {{{key}: VALUE}}"
    if name in COMMAND_FLAGS:
        return f"it is a flag of the train command, --{name}"
    return "it is gone; " + (REMOVED[name][1] or "leave it out") if name in REMOVED else ""
