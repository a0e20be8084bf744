"""Wan's gradient at the adapter against finite differences, in every way to run its blocks."""

import pytest
import torch
from problem import STEPS, Problem, keep_float64
from tiny import TEXT_WIDTH
from tiny_wan import tiny_wan_transformer

from rlhf.adapter.lora import add_adapter, lora_config
from rlhf.adapter.masters import MasterWeights
from rlhf.config import RewardGradientConfig
from rlhf.execution.blocks import RECOMPUTE, BlockRunner
from rlhf.execution.offload import HostMemory
from rlhf.execution.weight_streaming import stream_blocks
from rlhf.types import Conditioning
from rlhf.wan.blocks import WAN_BLOCK

MODULES = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "time_proj"]


def wan_problem(modules=None) -> Problem:
    """The problem with Wan's transformer in place of ContentV's."""
    problem = Problem()
    config = RewardGradientConfig(lora_rank=2, lora_target_modules=modules)
    problem.transformer = tiny_wan_transformer().double()
    add_adapter(problem.transformer, lora_config(config), seed=0)
    problem.masters = MasterWeights(problem.transformer)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        problem.masters.vector += 0.1 * torch.randn(problem.masters.vector.shape, generator=generator).double()
    problem.masters.write()
    text = (torch.randn(2, 6, TEXT_WIDTH, generator=generator).double() for _ in range(2))
    positive, negative = text
    problem.cond = Conditioning(positive, positive[:, 0, :0], negative, negative[:, 0, :0])
    return problem


@pytest.mark.parametrize("modules", [None, MODULES])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradient_equals_central_finite_differences(monkeypatch, modules, checkpointed):
    keep_float64(monkeypatch)
    problem, step = wan_problem(modules), 2e-5
    gradient = problem.gradient(2, problem.checkpointed if checkpointed else None)
    assert all(piece.abs().max() > 0 for piece in problem.masters.named(gradient).values())
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    difference = problem.loss_at(step * direction, 2) - problem.loss_at(-step * direction, 2)
    assert difference / (2 * step) == pytest.approx((gradient @ direction).item(), rel=1e-6)


@pytest.mark.parametrize("modules", [None, MODULES])
@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
def test_no_way_to_run_the_blocks_changes_the_gradient(recompute, modules):
    problem = wan_problem(modules)
    expected = problem.gradient(STEPS)
    for together in (False, True):
        host, fetch = HostMemory(torch.device("cpu"), 1), None
        if together:  # last, for it moves the weights
            fetch = stream_blocks(problem.transformer, torch.device("cpu")).fetch
        runner = BlockRunner(recompute=recompute, host=host, fetch=fetch, parts=WAN_BLOCK)
        problem.transformer.run_block = runner
        gradient = problem.gradient(STEPS, problem.checkpointed, together=together)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
