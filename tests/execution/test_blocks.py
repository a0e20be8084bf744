"""Blocks in three parts have diffusers' numbers and gradients, and save only their inputs."""

import gc
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from adapted_model import arguments, assert_equal, gradients, model_with_adapter
from kept import KeptBytes

from rlhf.execution import attention as attention_module
from rlhf.execution.attention import (
    KERNELS,
    attention_function,
    faster_inference_attention,
    load_flash_attention_3,
    time_kernels,
)
from rlhf.execution.blocks import RECOMPUTE, BlockRunner
from rlhf.execution.offload import HostMemory


@pytest.mark.parametrize("host", [None, HostMemory("cpu", smallest_bytes=64)])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_gradients_are_those_of_the_stock_block(recompute, host):
    model, inputs = model_with_adapter(num_layers=3), arguments()
    expected_velocity, expected = model(*inputs).sample, gradients(model, inputs)
    model.run_block = BlockRunner(recompute=recompute, host=host)
    torch.testing.assert_close(model(*inputs).sample, expected_velocity, rtol=1e-12, atol=1e-12)
    for _ in range(2):
        assert_equal(gradients(model, inputs), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_in_float32_and_bfloat16(recompute):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        model, inputs = model_with_adapter(dtype), arguments(dtype)
        expected = gradients(model, inputs)
        model.run_block = BlockRunner(recompute=recompute)
        for name, grad in gradients(model, inputs).items():
            assert (grad - expected[name]).norm() <= tolerance * expected[name].norm(), name


def test_blocks_trained_whole_have_their_gradients():
    model, inputs = model_with_adapter(), arguments()
    model.transformer_blocks[0].requires_grad_(True)
    expected = gradients(model, inputs)
    model.run_block = BlockRunner(recompute="all but attention")
    assert_equal(gradients(model, inputs), expected, rtol=1e-9, atol=1e-12)
    assert any(name.endswith("norm1.linear.weight") for name in expected)


def test_attention_runs_once_where_it_is_kept():
    model, inputs, calls = model_with_adapter(), arguments(), []

    def attention(*qkv):
        calls.append(torch.is_grad_enabled())
        return F.scaled_dot_product_attention(*qkv)

    for recompute, expected in (("nothing", 2), ("block", 4), ("all but attention", 2)):
        model.run_block = BlockRunner(attention, recompute)
        calls.clear()
        gradients(model, inputs)
        assert len(calls) == expected, recompute
    calls.clear()
    with torch.no_grad():
        model(*inputs)
    assert calls == [False, False]


def kept(model, inputs, run_block):
    model.run_block = run_block
    model.zero_grad()
    with KeptBytes(model) as kept:
        loss = model(*inputs).sample.sum()
        held = kept.now
        loss.backward()
    return held, kept.most


def test_what_is_kept():
    """A block saves its inputs, and the attention's result if that is not recomputed."""
    model, inputs = model_with_adapter(torch.float32, num_layers=6), arguments(torch.float32, batch=1, frames=12)
    host = HostMemory("cpu", smallest_bytes=64)
    nothing = kept(model, inputs, BlockRunner())
    block = kept(model, inputs, BlockRunner(recompute="block"))
    attention = kept(model, inputs, BlockRunner(recompute="all but attention"))
    on_host = kept(model, inputs, BlockRunner(recompute="all but attention", host=host))
    video, text, width = 12 * 2 * 3, 6, 32
    state = 4 * width * (video + text)
    assert block[0] < nothing[0] / 8
    extra = (attention[0] - block[0]) / 6
    rows, gates = 4 * 2 * (video + text), 4 * 8 * width
    assert state <= extra <= state + 2 * rows + gates, "its result and a log-sum-exp for each row, once"
    assert on_host[0] < block[0] / 2
    assert sum(b.numel() for buffers in host.free.values() for b in buffers) > 6 * 2 * state * 0.9
    assert attention[1] - attention[0] < block[1] - block[0], "one half of a block has a graph at a time"
    assert block[1] < nothing[1] / 3
    model.enable_gradient_checkpointing()
    assert block[0] <= kept(model, inputs, None)[0], "no more than diffusers' own checkpointing"


def test_attention_is_freed_with_the_graph_and_needs_no_garbage_collector():
    seen, model, inputs = [], model_with_adapter(), arguments()

    def attention(*projected):
        seen.extend(weakref.ref(x) for x in projected)
        result = F.scaled_dot_product_attention(*projected)
        seen.append(weakref.ref(result))
        return result

    model.run_block = BlockRunner(attention, recompute="all but attention")
    gc.collect()
    gc.disable()
    try:
        (v,) = model(*inputs, return_dict=False)
        alive = [x() for x in seen if x() is not None]
        assert alive, "the ends of the graph"
        assert not any(x.untyped_storage().nbytes() for x in alive), "without numbers"
        v.sum().backward()
        del v, alive
        assert not any(x() is not None for x in seen)
        (v,) = model(*inputs, return_dict=False)
        del v
        assert not any(x() is not None for x in seen), "a graph that is never used"
    finally:
        gc.enable()


def test_the_parts_around_the_attention_can_be_compiled():
    model, inputs, compiled = model_with_adapter(), arguments(), []
    expected = gradients(model, inputs)

    def compiler(function):
        compiled.append(function.__name__)
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    model.run_block = BlockRunner(recompute="all but attention", compiler=compiler)
    assert_equal(gradients(model, inputs), expected, rtol=1e-9, atol=1e-12)
    assert compiled == ["before_attention", "after_attention"]
    torch._dynamo.reset()


def test_one_compilation_serves_all_blocks_but_the_last():
    counter = torch._dynamo.testing.CompileCounter()
    model, inputs = model_with_adapter(num_layers=6), arguments()
    model.run_block = BlockRunner(compiler=lambda f: torch.compile(f, backend=counter, fullgraph=True))
    with torch.no_grad():
        model(*inputs)
    assert counter.frame_count == 2, "before and after the attention"
    torch._dynamo.reset()


def test_weights_are_fetched_before_each_use():
    model, inputs, log = model_with_adapter(), arguments(), []
    index = {id(block): i for i, block in enumerate(model.transformer_blocks)}
    model.run_block = BlockRunner(recompute="all but attention", fetch=lambda block: log.append(index[id(block)]))
    gradients(model, inputs)
    assert log == [0, 0, 1, 1, 1, 1, 0, 0]


def test_a_scale_of_the_adapter_is_refused_where_blocks_are_recomputed():
    model, inputs = model_with_adapter(), arguments()
    model.run_block = BlockRunner(recompute="block")
    with pytest.raises(ValueError, match="expected no scale"):
        model(*inputs, joint_attention_kwargs={"scale": 0.5})


def test_kernels_are_timed_and_those_that_do_not_work_left_out():
    seconds = time_kernels(torch.device("cpu"), torch.float32, heads=2, width=16, tokens=64)
    assert list(seconds.values()) == sorted(seconds.values())
    assert "cudnn" not in seconds
    assert set(seconds) <= set(KERNELS)
    query, key, value = torch.randn(3, 1, 2, 8, 16)
    expected = F.scaled_dot_product_attention(query, key, value)
    for kernel in [None, *seconds]:
        torch.testing.assert_close(attention_function(kernel)(query, key, value), expected)
    with pytest.raises(RuntimeError):
        attention_function("cudnn")(query, key, value)


def test_flash_attention_3_is_used_without_gradient_where_it_is_installed_and_faster(monkeypatch):
    query, key, value = torch.randn(3, 1, 2, 8, 16)
    expected, about = F.scaled_dot_product_attention(query, key, value), (torch.device("cpu"), torch.float32, 2, 16, 8)
    monkeypatch.setattr(attention_module, "FLASH_ATTENTION_3", ("no_such_package", "stand_in"))
    assert load_flash_attention_3() is None
    assert faster_inference_attention(F.scaled_dot_product_attention, *about) is None

    def of_tokens(*inputs):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2)

    def slow(*inputs):
        time.sleep(0.02)
        return F.scaled_dot_product_attention(*inputs)

    for found in (of_tokens, lambda *inputs: (of_tokens(*inputs), None)):  # some releases return the log-sum-exp, too
        monkeypatch.setitem(sys.modules, "stand_in", SimpleNamespace(flash_attn_func=found))
        assert torch.equal(load_flash_attention_3()(query, key, value), expected)
    other, line = faster_inference_attention(slow, *about)
    assert torch.equal(other(query, key, value), expected)
    assert line.startswith("FlashAttention-3 in no-grad steps, ")

    def unknown_chip(*_):
        raise RuntimeError("FlashAttention only supports Hopper")

    monkeypatch.setitem(sys.modules, "stand_in", SimpleNamespace(flash_attn_func=unknown_chip))
    assert faster_inference_attention(slow, *about) is None


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_inference_attention_is_kept_out_of_gradients(recompute):
    model, inputs, calls = model_with_adapter(), arguments(), []

    def without_gradient(*projected):
        calls.append(torch.is_grad_enabled())
        return F.scaled_dot_product_attention(*projected)

    expected = gradients(model, inputs)
    model.run_block = BlockRunner(recompute=recompute, inference_attention=without_gradient)
    assert_equal(gradients(model, inputs), expected, rtol=1e-9, atol=1e-12)
    assert calls == []
    with torch.no_grad():
        model(*inputs)
    assert calls == [False, False]
