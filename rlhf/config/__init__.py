"""The settings of a run: one dataclass, read from YAML and flags."""

from rlhf.config.settings import (
    GUIDANCE_GRADIENTS,
    METHODS,
    VIDEO_SIZE,
    ConfigError,
    RewardGradientConfig,
    at_eval_size,
    field_names,
    is_distilled,
    range_problems,
    range_text,
    setting,
    with_sampling,
)

__all__ = [
    "GUIDANCE_GRADIENTS",
    "METHODS",
    "VIDEO_SIZE",
    "ConfigError",
    "RewardGradientConfig",
    "at_eval_size",
    "field_names",
    "is_distilled",
    "range_problems",
    "range_text",
    "setting",
    "with_sampling",
]
