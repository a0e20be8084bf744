"""Gradient checkpointing: the same gradients, and only inputs saved, on the device or host."""

import gc

import pytest
import torch
from fake_stream import FakeStream
from torch.autograd.graph import saved_tensors_hooks

from rlhf.execution.offload import HostMemory
from rlhf.execution.recompute import gradient_checkpoint, offload_saved_tensors

WEIGHT = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(5, 6)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Layers:
    """Three layers with weights; calls are counted and saved tensors collected."""

    def __init__(self):
        self.weights = [numbers(6, 6, seed=i).requires_grad_() for i in range(3)]
        self.calls, self.kept = [], []

    def one(self, i, x, carry):
        self.calls.append(i)
        y = torch.tanh(x @ self.weights[i]) + (0 if carry is None else carry)
        return y, y.square() if i else None

    def plain(self, x):
        carry = None
        for i in range(3):
            x, carry = self.one(i, x, carry)
        return x * carry

    def stepwise(self, x, offload=lambda: None):
        carry = None
        for i in range(3):

            def step(x, carry, i=i):
                return self.one(i, x, carry)

            x, carry = gradient_checkpoint(step, x, carry, parameters=[self.weights[i]], offload=offload())
        return x * carry

    def gradients(self, forward):
        for weight in self.weights:
            weight.grad = None
        x = numbers(5, 6, seed=9).requires_grad_()
        with saved_tensors_hooks(self._count, lambda t: t):
            y = forward(x)
        (y * WEIGHT).sum().backward()
        return [x.grad, *(w.grad for w in self.weights)]

    def _count(self, tensor):
        self.kept.append(tensor)
        return tensor


def test_gradients_are_those_of_autograd_and_only_inputs_are_kept():
    layers = Layers()
    expected = layers.gradients(layers.plain)
    kept, layers.kept, layers.calls = len(layers.kept), [], []
    for found, grad in zip(layers.gradients(layers.stepwise), expected, strict=True):
        assert torch.equal(found, grad)
    assert layers.calls == [0, 1, 2, 2, 1, 0]
    assert len(layers.kept) == 1 + 1 + 2 + 2 < kept, "x; then x and the carry, for the last product too"


def test_pieces_within_pieces_keep_the_outer_inputs_alone():
    layers = Layers()
    expected = layers.gradients(layers.plain)
    layers.kept, layers.calls = [], []

    def nested(x):
        return gradient_checkpoint(layers.stepwise, x, parameters=layers.weights)

    for found, grad in zip(layers.gradients(nested), expected, strict=True):
        assert torch.equal(found, grad)
    assert layers.calls == [0, 1, 2, 0, 1, 2, 2, 1, 0]
    assert len(layers.kept) == 1


def test_a_constant_or_a_forward_without_gradient_is_run_once():
    layers, x = Layers(), numbers(5, 6)
    for weight in layers.weights:
        weight.requires_grad_(False)
    assert not layers.stepwise(x).requires_grad
    with torch.no_grad():
        assert not layers.stepwise(x.clone().requires_grad_()).requires_grad
    assert layers.calls == [0, 1, 2] * 2


def test_autograd_grad_reaches_parameters_and_unused_outputs_cost_nothing():
    layers, x = Layers(), numbers(5, 6).requires_grad_()
    y, _ = gradient_checkpoint(lambda x: layers.one(1, x, None), x, parameters=[layers.weights[1]])
    (found,) = torch.autograd.grad(y.sum(), layers.weights[1])
    (expected,) = torch.autograd.grad(layers.one(1, x, None)[0].sum(), layers.weights[1])
    assert torch.equal(found, expected)


def test_a_gradient_that_is_a_slice_does_not_hold_the_whole():
    """The decoder joins caches and frames by `cat`, whose gradients are slices."""
    cache, x = (numbers(n, 6, seed=n).requires_grad_() for n in (2, 5))
    joined = gradient_checkpoint(lambda *pair: torch.cat(pair).square(), cache, x)
    expected = torch.autograd.grad(torch.cat([cache, x]).square().sum(), [cache, x])
    for found, grad in zip(torch.autograd.grad(joined.sum(), [cache, x]), expected, strict=True):
        assert torch.equal(found, grad)
        assert found.untyped_storage().nbytes() == found.nbytes


def test_an_input_that_a_piece_within_leaves_alone_gets_no_gradient():
    x, unread = numbers(5, 6).requires_grad_(), numbers(5, 6, seed=1).requires_grad_()

    def outer(x, unread):
        y, _ = gradient_checkpoint(lambda x, unread: (x.square(), 3 * unread), x, unread)
        return gradient_checkpoint(lambda y, unread: y + 1, y, unread)

    found, none = torch.autograd.grad(gradient_checkpoint(outer, x, unread).sum(), [x, unread], allow_unused=True)
    assert torch.equal(found, 2 * x)
    assert none is None


def test_an_output_that_depends_on_nothing_passes_no_gradient_on():
    x = numbers(5, 6).requires_grad_()
    y, constant = gradient_checkpoint(lambda x: (x.square(), WEIGHT + 0), x)
    (found,) = torch.autograd.grad((y * constant).sum(), x, retain_graph=True)
    assert torch.equal(found, 2 * x * WEIGHT)
    assert torch.autograd.grad(constant.sum(), x, allow_unused=True) == (None,)


def test_an_input_that_is_given_twice_gets_both_gradients():
    x = numbers(5, 6).requires_grad_()
    joined = gradient_checkpoint(lambda one, other: torch.cat([one, 2 * other]).square() * torch.cat([one, one]), x, x)
    expected = torch.autograd.grad((torch.cat([x, 2 * x]).square() * torch.cat([x, x])).sum(), x)[0]
    assert torch.allclose(torch.autograd.grad(joined.sum(), x)[0], expected, rtol=1e-14)


def test_offload_saved_tensors_host_memory_gives_the_same_gradients_and_buffers_are_used_again():
    layers, host = Layers(), HostMemory("cpu", smallest_bytes=100)
    expected = layers.gradients(layers.plain)
    for _ in range(2):
        layers.kept = []
        for found, grad in zip(layers.gradients(lambda x: layers.stepwise(x, host.group)), expected, strict=True):
            assert torch.equal(found, grad)
        assert len(layers.kept) == 2, "what the last product keeps; the rest went to the host"
        assert {size: len(buffers) for size, buffers in host.free.items()} == {5 * 6 * 8: 4}


def test_groups_come_back_last_first_with_the_one_before_on_its_way():
    host, log = HostMemory("cpu", smallest_bytes=0), []
    x = numbers(4).requires_grad_()
    y = x
    for _ in range(3):
        with offload_saved_tensors(host.group()):
            y = y * 2 * y
    groups = []
    group = host.last()
    while group is not None:
        groups.append(group)
        group = group.previous()
    for i, group in enumerate(groups):
        ask = group.prefetch
        group.prefetch = lambda ask=ask, i=i: (log.append(i), ask())
    del group
    y.sum().backward()
    assert log[:2] == [0, 1], "the last group, and at once the one before"
    assert sorted(set(log)) == [0, 1, 2]
    assert all(kept.buffer is None and kept.tensor is None for group in groups for kept in group.kept)


def test_strides_and_slices_survive_the_host():
    host = HostMemory("cpu", smallest_bytes=0)
    x = numbers(2, 3, 4, 5).to(memory_format=torch.channels_last)[:, :, 1:].requires_grad_()
    with offload_saved_tensors(host.group()):
        y = x * x
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, 2 * x)
    assert sum(b.numel() for buffers in host.free.values() for b in buffers) == 2 * x.numel() * 8


def test_a_graph_that_is_dropped_frees_its_host_memory():
    host = HostMemory("cpu", smallest_bytes=0)
    with offload_saved_tensors(host.group()):
        y = numbers(4).requires_grad_().square()
    assert host.last() is not None
    del y
    gc.collect()
    assert host.last() is None


def test_a_second_backward_pass_is_refused():
    host = HostMemory("cpu", smallest_bytes=0)
    with offload_saved_tensors(host.group()):
        y = numbers(4).requires_grad_().square().sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        y.backward()


def test_on_an_accelerator_copies_run_aside_and_are_waited_for(monkeypatch):
    log = []
    main, side = FakeStream("main", log), FakeStream("side", log)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"kept for {stream.name}"))
    host = HostMemory("cpu", smallest_bytes=0)
    host.stream = side
    monkeypatch.setattr(host, "take", lambda size: torch.empty(size, dtype=torch.uint8))
    x = numbers(4).requires_grad_()
    with offload_saved_tensors(host.group()):
        y = x.exp()
    copied = ["side waits for main", "on side", "off side"]
    assert log == ["event", *copied, "kept for side"], "the source outlives its copy"
    log.clear()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert log == ["event", *copied, "event", "kept for side", "main waits for event"]
    torch.testing.assert_close(grad, x.exp())


def test_on_an_accelerator_no_more_than_two_groups_are_copied_at_a_time():
    log = []
    host = HostMemory("cpu")
    host.stream = FakeStream("side", log)
    for _ in range(4):
        host.group()
    assert log == ["event", "event", "event", "host waits for event 1", "event", "host waits for event 2"]
