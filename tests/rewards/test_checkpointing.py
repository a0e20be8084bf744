"""Recomputed layers: same values and gradients, only inputs kept, nothing without gradients."""

import pytest
import torch

from rewards.common.checkpointing import recompute_in_backward


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.runs = torch.nn.Linear(4, 4), 0

    def forward(self, x, scale=1.0):
        self.runs += 1
        return torch.tanh(self.linear(x)) * scale


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return torch.nn.ModuleList([Layer(), Layer()]).requires_grad_(False).eval()


def run(layers, x):
    for layer in layers:
        x = layer(x, scale=2.0)
    return x


def test_values_and_gradients_stay(layers):
    x = torch.randn(3, 4, requires_grad=True)
    plain = run(layers, x)
    (gradient,) = torch.autograd.grad(plain.sum(), x)
    recompute_in_backward(layers)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        again = run(layers, x)
    assert torch.equal(again, plain)
    assert sum(t.numel() for t in kept) <= len(layers) * x.numel()  # some releases keep an empty tensor besides
    before = [layer.runs for layer in layers]
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], gradient)
    assert [layer.runs for layer in layers] == [runs + 1 for runs in before]


def test_without_gradients_a_layer_runs_once(layers):
    recompute_in_backward(layers)
    with torch.no_grad():
        run(layers, torch.randn(3, 4))
    assert [layer.runs for layer in layers] == [1, 1]
