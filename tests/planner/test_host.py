"""Host memory by phase: what each setting takes, and the line of the dry run."""

from plans import tiny

from rlhf.planner.host import PROCESS_BYTES, HostPlan
from rlhf.planner.search import Planner
from rlhf.planner.text import format_host

GIB = 2**30


def test_each_setting_takes_host_memory_for_what_leaves_the_device():
    _, args, card = tiny(eval_prompts="none", num_frames=9, height=128, width=128)
    planner = Planner(args, card)
    recomputed = {"gradient_checkpointing": True}
    plan = lambda **settings: planner.estimate(settings).host.phases["training"] - PROCESS_BYTES
    blocks = planner.model.frozen.blocks * planner.model.itemsize
    assert plan(**recomputed) == 0
    assert blocks <= plan(**recomputed, stream_weights=True) < 1.5 * blocks
    decoded = {"decode_chunk": 1, "decode_checkpoint": True}
    assert plan(**decoded, decode_caches="host") > plan(**decoded) == 0
    loading = planner.estimate().host.phases["loading the transformer"] - PROCESS_BYTES
    assert loading == blocks + planner.model.frozen.rest * planner.model.itemsize
    on_cpu = Planner(args, card, kind="cpu").estimate()
    assert on_cpu.host.phases["training"] > on_cpu.memory.peak_bytes


def test_the_dry_run_says_it_and_what_a_machine_lacks():
    plan = HostPlan({"encoding prompts": 11 * GIB, "training": 30 * GIB})
    line = "Host memory: 30.00 GiB, within 15%, most for training."
    assert format_host(plan, 1, None) == line
    assert format_host(plan, 1, 30 * GIB) == f"{line} This machine has 30.00 GiB."
    told = format_host(plan, 2, 32 * GIB)
    assert "30.00 GiB for each process" in told
    assert "It does not fit: this machine has 32.00 GiB. Stream_weights" in told
