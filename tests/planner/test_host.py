"""Host memory by phase: what was measured, what each setting changes, and the line of the dry run."""

import dataclasses

from plans import tiny

from rlhf.config import RewardGradientConfig
from rlhf.planner.host import PROCESS_BYTES
from rlhf.planner.search import Planner
from rlhf.planner.text import plan_report

GIB = 2**30


def test_each_setting_takes_host_memory_for_what_leaves_the_device():
    _, args, card = tiny(eval_prompts="none", num_frames=17, height=256, width=256)
    planner = Planner(args, card)
    recomputed = {"gradient_checkpointing": True}
    plan = lambda **settings: planner.estimate(settings).host.phases["training"] - PROCESS_BYTES
    blocks = planner.model.frozen.blocks * planner.model.itemsize
    assert plan(**recomputed) == 0
    assert blocks <= plan(**recomputed, stream_weights=True) < 1.5 * blocks
    offloaded = plan(**recomputed, offload_activations=True)
    assert plan(**recomputed, offload_activations=True, stepwise_backward=True) < offloaded, "one graph at a time"
    decoded = {"decode_chunk": 1, "decode_checkpoint": True}
    assert plan(**decoded, decode_caches="host") > plan(**decoded) == 0
    loading = planner.estimate().host.phases["loading the transformer"] - PROCESS_BYTES
    assert loading == blocks + planner.model.frozen.rest * planner.model.itemsize


def test_the_dry_run_says_it_and_what_a_machine_lacks(monkeypatch):
    settings = {"reward_funcs": ["hps_v2_1"], "height": 64, "width": 64, "eval_prompts": None, "device": "cpu"}
    args = RewardGradientConfig(model="ByteDance/ContentV-8B", gradient_checkpointing=True, **settings)
    args = dataclasses.replace(args, stream_weights=True)
    monkeypatch.setattr("rlhf.planner.text.host_memory", lambda: 512 * GIB)
    assert "most for training. This machine has 512.00 GiB." in plan_report(args)
    monkeypatch.setattr("rlhf.planner.text.host_memory", lambda: 16 * GIB)
    assert "within 15%, most for training. It does not fit: this machine has 16.00 GiB." in plan_report(args)
    elsewhere = plan_report(args, memory_limit_gib=24, device_name="NVIDIA H200")
    assert "Host memory: " in elsewhere
    assert "this machine" not in elsewhere.lower()
