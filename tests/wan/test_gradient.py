"""Wan's gradient at the adapter against finite differences, in every way to run its blocks."""

import pytest
import torch
from problem import STEPS, Problem, keep_float64

from rlhf.execution.blocks import RECOMPUTE
from rlhf.execution.offload import HostMemory
from rlhf.execution.weight_streaming import stream_blocks

MODULES = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "time_proj"]


@pytest.mark.parametrize("modules", [None, MODULES])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradient_equals_central_finite_differences(monkeypatch, modules, checkpointed):
    keep_float64(monkeypatch)
    problem, step = Problem(wan=True, modules=modules), 2e-5
    gradient = problem.gradient(2, problem.checkpointed if checkpointed else None)
    assert all(piece.abs().max() > 0 for piece in problem.masters.named(gradient).values())
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    difference = problem.loss_at(step * direction, 2) - problem.loss_at(-step * direction, 2)
    assert difference / (2 * step) == pytest.approx((gradient @ direction).item(), rel=1e-6)


@pytest.mark.parametrize("modules", [None, MODULES])
@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
def test_no_way_to_run_the_blocks_changes_the_gradient(recompute, modules):
    problem = Problem(wan=True, modules=modules)
    expected = problem.gradient(STEPS)
    for together in (False, True):
        host, fetch = HostMemory(torch.device("cpu"), 1), None
        if together:  # last, for it moves the weights
            fetch = stream_blocks(problem.transformer, torch.device("cpu")).fetch
        problem.recompute_blocks(recompute, host=host, fetch=fetch)
        gradient = problem.gradient(STEPS, problem.checkpointed, together=together)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
