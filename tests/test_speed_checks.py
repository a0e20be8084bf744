"""Settings about speed that do not go together are said before any weight is loaded."""

import pytest

from rlhf.checks import with_sampling
from rlhf.config import RewardGradientConfig
from rlhf.contentv.files import SamplingDefaults
from rlhf.contentv.wan_decoder import CACHES
from rlhf.speed_checks import CHOICES, speed_problems

CHECKPOINTED = {"gradient_checkpointing": True}


def problems(**settings):
    return list(speed_problems(with_sampling(RewardGradientConfig(**settings), SamplingDefaults())))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        CHECKPOINTED | {"keep_attention": True, "offload_activations": True, "stream_weights": True},
        {"decode_chunk": 1, "decode_checkpoint": True, "decode_caches": "host", "decode_window": 5},
        {"sampling_weights": "merged", "rollout_reuse": 2, "num_grad_steps": 49},
        {"second_order_prefix": True, "guidance_every": 2, "num_grad_steps": 48},
        {"prefix_steps": 10, "second_order_prefix": True, "guidance_every": 2, "rollout_reuse": 4},
        {"sampling_weights": "float8", "method": "srpo", "guidance_every": 2},
        {"prefix_steps": 10, "method": "alignprop", "num_grad_steps": 4},
    ],
)
def test_good_settings_pass(settings):
    assert problems(**settings) == []


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"attention_kernel": "best"}, "attention_kernel: got 'best', expected one of auto, default, cudnn, flash"),
        ({"decode_caches": "disk"}, "decode_caches: got 'disk', expected one of keep, recompute, host"),
        ({"base_bits": 3}, "base_bits: got 3, expected one of None, 8, 4; choose one"),
        ({"sampling_weights": "int4"}, "sampling_weights: got 'int4', expected one of own, merged, float8"),
        ({"vae_dtype": "float16"}, "vae_dtype: got 'float16', expected one of float32, bfloat16"),
        ({"decode_window": 0}, "decode_window: got 0, expected at least 1; raise it"),
        ({"keep_attention": True}, "keep_attention: got it without gradient_checkpointing"),
        ({"offload_activations": True}, "offload_activations: got it without gradient_checkpointing"),
        ({"stream_weights": True}, "stream_weights: got it without gradient_checkpointing"),
        ({"decode_caches": "recompute"}, "decode_caches: got recompute without decode_checkpoint"),
        (CHECKPOINTED | {"stream_weights": True, "base_bits": 8}, "stream_weights and base_bits: got both"),
        (CHECKPOINTED | {"stream_weights": True, "sampling_weights": "merged"}, "merged with stream_weights"),
        ({"sampling_weights": "merged", "lora_use_dora": True}, "sampling_weights: got merged with lora_use_dora"),
        ({"prefix_steps": 5, "method": "uniform"}, "prefix_steps: got it with method uniform, expected draft_k"),
        ({"second_order_prefix": True, "method": "drtune"}, "second_order_prefix: got it with method drtune"),
        ({"rollout_reuse": 2, "method": "alignprop"}, "rollout_reuse: got it with method alignprop"),
        ({"prefix_steps": 49}, "prefix_steps=49, but only 49 of num_inference_steps=50 come before the window"),
        ({"second_order_prefix": True, "num_grad_steps": 49}, "second_order_prefix: got it with 1 of"),
        ({"guidance_every": 2, "num_grad_steps": 49}, "guidance_every: got it with 1 of"),
        ({"sampling_weights": "merged", "num_grad_steps": 50}, "sampling_weights: got it with 0 of"),
        ({"rollout_reuse": 2, "num_grad_steps": 50}, "rollout_reuse: got it with 0 of"),
        ({"guidance_together": True, "guidance_scale": 1.0}, "guidance_together: got it with guidance_scale 1.0"),
        ({"rollout_reuse": 2, "drift_weight": 1.0}, "rollout_reuse: got drift_weight"),
        ({"guidance_every": 2, "guidance_scale": 1.0}, "guidance_every: got 2, but nothing is guided here"),
    ],
)
def test_what_does_not_go_together_is_said(settings, told):
    assert any(told in problem for problem in problems(**settings)), problems(**settings)


def test_a_missing_library_is_said(monkeypatch):
    monkeypatch.setattr("rlhf.quantise.importlib.util.find_spec", lambda name: None)
    assert problems(base_bits=4) == [
        "base_bits=4 needs bitsandbytes, which is not installed; pip install bitsandbytes, or leave it out"
    ]


def test_the_decoder_knows_the_caches_that_may_be_chosen():
    assert CHOICES["decode_caches"] == (*CACHES, "host")
