"""Settings about speed that do not go together are said before any weight is loaded."""

import typing

import pytest

from rlhf.checks.execution import execution_problems
from rlhf.config import RewardGradientConfig, with_sampling
from rlhf.execution.attention import KERNELS
from rlhf.generator.files import SamplingDefaults

CHECKPOINTED = {"gradient_checkpointing": True}


def problems(**settings):
    return list(execution_problems(with_sampling(RewardGradientConfig(**settings), vars(SamplingDefaults()))))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        CHECKPOINTED | {"keep_attention": True, "offload_activations": True, "stream_weights": True},
        {"decode_chunk": 1, "decode_checkpoint": True, "decode_caches": "host", "decode_window": 5},
        {"rollout_reuse": 2, "num_grad_steps": 49},
        {"prefix_steps": 10, "rollout_reuse": 4},
        {"prefix_steps": 10, "method": "alignprop", "num_grad_steps": 4},
    ],
)
def test_good_settings_pass(settings):
    assert problems(**settings) == []


def test_the_kernels_that_may_be_chosen_are_those_there_are():
    choices = typing.get_args(typing.get_type_hints(RewardGradientConfig)["attention_kernel"])
    assert choices == ("auto", "default", *KERNELS)
