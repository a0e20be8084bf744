"""Settings about speed become a way to run blocks, and none but few bits changes a gradient."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from adapted_model import arguments, gradients, model_with_adapter

from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.execution import apply as module
from rlhf.execution.apply import (
    ExecutionOptions,
    UnsupportedOptionError,
    choose_inference_kernel,
    choose_kernel,
    require_compiler,
    set_up_blocks,
)
from rlhf.training.setup import find_base

CPU = torch.device("cpu")
RECOMPUTED = {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        RECOMPUTED,
        RECOMPUTED | {"keep_attention": True},
        RECOMPUTED | {"offload_activations": True},
        RECOMPUTED | {"stream_weights": True, "keep_attention": True, "offload_activations": True},
        {"attention_kernel": "flash"},
    ],
)
def test_gradients_are_those_of_the_stock_blocks(settings):
    model, inputs = model_with_adapter(torch.float32), arguments(torch.float32)
    expected = gradients(model, inputs)
    chosen = set_up_blocks(model, ExecutionOptions(**settings), CPU)
    assert (model.run_block is None) == (settings == {}), "on a CPU the default is left as it was"
    assert chosen == ({"attention_kernel": settings.get("attention_kernel", "PyTorch's choice")} if settings else {})
    for name, grad in gradients(model, inputs).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5)


def test_recompute_follows_the_settings():
    assert ExecutionOptions().recompute == "nothing"
    assert ExecutionOptions(gradient_checkpointing=True).recompute == "block"
    assert ExecutionOptions(gradient_checkpointing=True, keep_attention=True).recompute == "all but attention"
    args = SimpleNamespace(**vars(ExecutionOptions(compile_blocks=True)), learning_rate=1.0)
    assert ExecutionOptions.from_settings(args) == ExecutionOptions(compile_blocks=True)


def test_the_fastest_kernel_is_chosen_and_reported(monkeypatch):
    model, asked = model_with_adapter(torch.float32), []

    def times(*args):
        asked.append(args)
        return {"cudnn": 0.004, "flash": 0.006}

    monkeypatch.setattr(module, "time_kernels", times)
    device = torch.device("cuda")
    line = "cudnn (forward and backward of 8,192 tokens: cudnn 4.0 ms, flash 6.0 ms)"
    assert choose_kernel(model, "auto", device) == ("cudnn", line)
    assert asked == [(device, torch.float32, 2, 16)]
    monkeypatch.setattr(module, "time_kernels", lambda *_: {})
    assert choose_kernel(model, "auto", device)[0] is None
    assert choose_kernel(model, "default", device)[0] is None
    monkeypatch.setattr(module, "time_kernels", None)
    for elsewhere in ("cpu", "mps", "meta"):
        assert choose_kernel(model, "auto", torch.device(elsewhere))[0] is None
    monkeypatch.setattr(module, "require_kernel", lambda *args: asked.append(args))
    assert choose_kernel(model, "efficient", device) == ("efficient", "efficient")
    assert asked[1:] == [("efficient", device, torch.float32, 2, 16)]


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
def test_a_kernel_that_the_device_lacks_is_refused_before_the_model_is_loaded(kernel, monkeypatch):
    told = f"attention_kernel: got {kernel} on cpu, which has none for .*; use auto or default"
    with pytest.raises(UnsupportedOptionError, match=told):
        choose_kernel(model_with_adapter(torch.float32), kernel, CPU)
    monkeypatch.setattr("rlhf.training.setup.Checkpoint.find", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=told):
        find_base(RewardGradientConfig(attention_kernel=kernel), CPU)


def test_a_device_without_a_compiler_is_told_before_the_model_is_loaded(monkeypatch):
    def fails(graph, inputs):
        raise OSError("no compiler at all\nand more of it")

    compile_with, backends = torch.compile, iter(["aot_eager", fails])
    monkeypatch.setattr("rlhf.training.setup.Checkpoint.find", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(torch, "compile", lambda work: compile_with(work, backend=next(backends)))
    require_compiler(CPU)
    torch._dynamo.reset()  # what was compiled above
    told = "compile_blocks: got true on cpu, where torch.compile fails .*no compiler at all.*; install it or use"
    with pytest.raises(ConfigError, match=told) as raised:
        find_base(RewardGradientConfig(compile_blocks=True), CPU)
    assert "and more of it" not in str(raised.value)


def test_what_is_faster_inference_attention_is_looked_for_on_cuda_and_reported(monkeypatch):
    model, asked, other = model_with_adapter(torch.float32), [], F.scaled_dot_product_attention

    def faster(*args):
        asked.append(args[1:])
        return other, "FlashAttention-3 without gradient"

    monkeypatch.setattr(module, "faster_inference_attention", faster)
    assert choose_inference_kernel(model, None, CPU) is None
    assert asked == []
    cuda = torch.device("cuda")
    assert choose_inference_kernel(model, None, cuda) == (other, "FlashAttention-3 without gradient")
    assert asked == [(cuda, torch.float32, 2, 16)]
    monkeypatch.setattr(module, "choose_inference_kernel", lambda *_: (other, "other, faster"))
    for kernel, line in (("auto", "PyTorch's choice; other, faster"), ("flash", "flash")):
        chosen = set_up_blocks(model, ExecutionOptions(attention_kernel=kernel, compile_blocks=True), CPU)
        assert chosen["attention_kernel"] == line
        assert (model.run_block.inference_attention is other) == (kernel == "auto")
