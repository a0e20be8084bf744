"""What a trace counts on "meta" tensors is what real tensors need."""

import pytest
import torch
import torch.distributed as dist
from kept import KeptBytes
from torch import nn
from torch.profiler import ProfilerActivity, profile

from rlhf.contentv.transformer import QueryKeyNorm
from rlhf.execution.collectives import all_gather, all_to_all, copy_to_group
from rlhf.execution.offload import HostMemory
from rlhf.execution.recompute import gradient_checkpoint
from rlhf.planner.tracer import MetaOffload, Operation, Trace, fake_process_group, fused_attention, use_fused_norms

META = torch.device("meta")


def profiled_peak(function) -> int:
    """Return the peak of allocated bytes on the CPU, by PyTorch's profiler."""
    torch.empty(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    changes = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_that_of_real_tensors(checkpointing):
    def forward_and_backward(device):
        with torch.device(device):
            layers = [
                nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64)) for _ in "1234"
            ]
            x = torch.zeros(512, 64)
        for layer in layers:
            y = gradient_checkpoint(layer, x, parameters=layer.parameters()) if checkpointing else layer(x)
            x = x + y.sin()
        x.sum().backward()

    real = profiled_peak(lambda: forward_and_backward("cpu"))
    with Trace() as trace, trace.phase() as phase:
        forward_and_backward(META)
    assert phase.peak_bytes == pytest.approx(real, rel=0.03)
    assert phase.bytes_after < 0.01 * phase.peak_bytes, "all is free again"


def test_work_is_counted_by_hand():
    x, w = (torch.empty(shape, device=META) for shape in ((3, 5), (5, 7)))
    image, kernel = torch.empty(1, 2, 8, 8, device=META), torch.empty(4, 2, 3, 3, device=META)
    with Trace() as trace, trace.phase() as phase:
        y = x @ w
        z = y.t().reshape(21).view(7, 3)
        z.add_(1)
        nn.functional.conv2d(image, kernel, padding=1)
        torch.empty(100, device=META)
    assert phase.work[Operation("matrix", "float32", 2 * 3 * 5 * 7, 4 * (15 + 35 + 21))] == 1
    assert phase.work[Operation("conv", "float32", 2 * 9 * 2 * 4 * 64, 4 * (128 + 72 + 256))] == 1
    moved = sum(op.bytes * n for op, n in phase.work.items() if op.kind == "other")
    assert moved == 4 * (2 * 21 + 2 * 21), "a copy, an addition; views and new tensors move nothing"
    assert phase.launches == sum(phase.work.values())


def test_attention_keeps_and_computes_what_a_fused_kernel_does():
    query = torch.empty(2, 3, 10, 4, device=META).requires_grad_()
    with Trace() as trace:
        trace.ignore(query)
        with trace.phase() as forward:
            result = fused_attention(query, query, query)
        with trace.phase() as backward:
            result.sum().backward()
    assert forward.work[Operation("attention", "float32", 4 * 2 * 3 * 10 * 10 * 4, 0)] == 1
    assert backward.work[Operation("attention", "float32", 10 * 2 * 3 * 10 * 10 * 4, 0)] == 1
    assert forward.bytes_after == 4 * (2 * 3 * 10 * 4 + 2 * 3 * 10), "the result and a number for each row"


def test_collectives_are_counted_by_what_a_rank_sends():
    x = torch.empty(4, 8, device=META)
    with fake_process_group(4) as group, Trace() as trace, trace.phase() as phase:
        all_to_all(x, group)
        all_gather(x, group)
        copy_to_group(x.requires_grad_(), group).backward(x.detach())
    sent = {op.bytes: count for op, count in phase.work.items() if op.kind == "collective"}
    assert sent == {4 * 32 * 3 // 4: 1, 4 * 32 * 3: 1, 2 * 4 * 32 * 3 // 4: 1}, "all-to-all, all-gather, all-reduce"
    assert not dist.is_initialized()
    with fake_process_group(1) as group:
        assert group is None


def test_a_norm_is_one_kernel():
    norm, x = QueryKeyNorm(16, 1e-6).to(META), torch.empty(5, 16, device=META).requires_grad_()
    use_fused_norms(nn.Sequential(norm))
    with Trace(norm) as trace, trace.phase() as phase:
        y = norm(x)
        assert phase.launches == 2  # the numbers of the rows, and the norm
    assert y.shape == x.shape
    assert trace.live_bytes == 4 * (5 * 16 + 5)


def test_offloaded_tensors_leave_the_device_and_come_back_one_group_ahead():
    """As with a real `HostMemory`, whose tensors autograd's own hooks see come and go."""
    sizes, real = {}, None
    for name, device, host in (("real", "cpu", HostMemory("cpu", 0)), ("meta", META, MetaOffload(0))):
        x = torch.zeros(1000, device=device).requires_grad_()
        with Trace() as trace:
            trace.ignore(x)
            y = x
            with trace.phase() as forward:
                for _ in range(4):
                    y = gradient_checkpoint(lambda t: t.sin() * t, y, offload=host.group())
            with trace.phase() as backward:
                y.sum().backward()
        sizes[name] = trace.live_bytes, x.grad.shape
        real = host if name == "real" else real
        if name == "meta":
            assert forward.offloaded == {size: len(found) for size, found in real.free.items()}, "x, and three results"
            assert backward.bytes_before <= 4 * 1000 * 2, "the result and the tensor under way, not all five"
    assert sizes["meta"][1] == sizes["real"][1]


def test_a_graph_holds_what_autograd_keeps():
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)))
    with KeptBytes(layers) as kept:
        y = layers(torch.zeros(4, 8))
        real = kept.now
    layers.to(META)
    x = torch.empty(4, 8, device=META)
    with Trace(layers) as trace:
        trace.ignore(x)
        y = layers(x)
    assert trace.live_bytes == real - 4 * 8 * 4 + y.nbytes  # the input was there before, the result is there too
