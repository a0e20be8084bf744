"""The first-block cache that bench/caching.py holds against fewer steps."""

import pytest
import torch
from scripts import script
from tiny import tiny_conditioning, tiny_transformer

from rlhf.execution.blocks import BlockRunner

caching = script("bench/caching.py")


@torch.no_grad()
@pytest.mark.parametrize("threshold", [caching.NEVER, caching.ALTERNATE, 0.5])
def test_a_cached_call_is_exact_where_nothing_has_changed_and_runs_the_first_block_alone(threshold):
    model = tiny_transformer(num_layers=4)
    draw = torch.Generator().manual_seed(0)
    latents, other = torch.randn(2, 1, 16, 2, 4, 6, generator=draw)
    cond = tiny_conditioning()
    text = cond.prompt_embeds_BLD[:1], cond.pooled_embeds_BP[:1]
    velocity = lambda x: model(x, *text, torch.tensor([500.0]), return_dict=False)[0]
    exact = velocity(latents), velocity(other)
    model.run_block = cache = caching.FirstBlockCache(BlockRunner(), model.transformer_blocks, threshold)
    calls = []
    for branch, x, expected in ((True, latents, exact[0]), (False, other, exact[1]), (True, latents, exact[0])):
        cache.branch = branch
        torch.testing.assert_close(velocity(x), expected)
        calls.append(cache.calls)
    is_cached = threshold != caching.NEVER
    assert calls == pytest.approx([1, 2, 2 + 1 / 38 if is_cached else 3]), "each branch has its own cache"


@torch.no_grad()
def test_a_first_block_that_adds_something_else_runs_them_all():
    model = tiny_transformer(num_layers=4)
    cond = tiny_conditioning()
    model.run_block = cache = caching.FirstBlockCache(BlockRunner(), model.transformer_blocks, 1e-6)
    for scale in (1.0, 1.5):
        latents = scale * torch.ones(1, 16, 2, 4, 6)
        model(latents, cond.prompt_embeds_BLD[:1], cond.pooled_embeds_BP[:1], torch.tensor([500.0]), return_dict=False)
    assert cache.calls == 2
