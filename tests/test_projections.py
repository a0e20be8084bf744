"""Stacked projections: peft's numbers, always of the adapter as it is, in the same memory and the same files."""

import pytest
import torch
from diffusers.models.attention import FeedForward
from peft import LoraConfig
from safetensors.torch import load_file
from test_blocks import TARGETS, arguments, gradients, model_with_adapter
from tiny import tiny_transformer

from rlhf import speed
from rlhf.contentv import projections
from rlhf.contentv.blocks import BlockRunner
from rlhf.contentv.projections import StackedProjections, feed_forward, project
from rlhf.lora import Masters
from rlhf.sampling_copy import SamplingCopy
from rlhf.speed import Speed, set_up_blocks

CPU = torch.device("cpu")
ALL = {"video", "text", "video_out", "text_out"}


def stacked(dtype=torch.float64, model=None):
    """A model with an adapter whose three blocks are stacked; an equal one that is not."""
    pair = [model or model_with_adapter(dtype, num_layers=3), model_with_adapter(dtype, num_layers=3)]
    pair[0].run_block = BlockRunner(projections=StackedProjections(pair[0].transformer_blocks))
    pair[1].run_block = BlockRunner()
    return pair


def groups(model):
    return [set(model.run_block.projections(block)) for block in model.transformer_blocks]


@torch.no_grad()
def velocity(model, inputs):
    return model(*inputs).sample


def change(model):
    """As an optimizer step does it: in float32 or more, then into the parameters."""
    masters = Masters(model)
    generator = torch.Generator().manual_seed(2)
    masters.set(torch.randn(masters.vector.shape, generator=generator).to(masters.vector) / 10)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_the_numbers_are_peft_s_before_and_after_the_adapter_changes(dtype, tolerance):
    (model, plain), inputs = stacked(dtype), arguments(dtype)
    before = velocity(plain, inputs)
    assert groups(model) == [ALL, ALL, ALL - {"text_out"}], "the last block has no result for the text"
    torch.testing.assert_close(velocity(model, inputs), before, rtol=tolerance, atol=tolerance)
    for each in (model, plain):
        change(each)
    after = velocity(plain, inputs)
    assert (after - before).norm() > 0.05 * before.norm()
    torch.testing.assert_close(velocity(model, inputs), after, rtol=tolerance, atol=tolerance)


def test_ranks_and_scales_may_differ_between_layers():
    config = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, rank_pattern={"to_k": 5}, alpha_pattern={"to_q": 1})
    config.init_lora_weights = False
    models = []
    for _ in range(2):
        model = tiny_transformer(num_layers=3).double()
        torch.manual_seed(0)
        model.add_adapter(config)
        models.append(model)
    expected = velocity(models[1], arguments())
    model, _ = stacked(model=models[0])
    assert groups(model)[0] == ALL
    torch.testing.assert_close(velocity(model, arguments()), expected, rtol=1e-12, atol=1e-12)
    scaled = arguments(), {"scale": 0.5}
    with torch.no_grad():
        found, expected = (m(*scaled[0], joint_attention_kwargs=scaled[1]).sample for m in models)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert model.run_block.projections(model.transformer_blocks[0])["video"].weight_OD.shape == (112, 32)


def test_gradients_and_what_computes_them_are_left_alone(monkeypatch):
    (model, plain), inputs = stacked(), arguments()
    expected = gradients(plain, inputs)
    monkeypatch.setattr(StackedProjections, "__call__", lambda *_: pytest.fail("used where a gradient is recorded"))
    for recompute in ("nothing", "block", "all but attention"):
        model.run_block.recompute = recompute
        found = gradients(model, inputs)
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-12)
            assert torch.equal(found[name], grad) or recompute != "nothing", name


def test_nothing_is_stored_twice_and_names_and_numbers_stay(tmp_path):
    model, plain = stacked(torch.float32)
    own, expected = model.state_dict(), plain.state_dict()
    assert list(own) == list(expected)
    assert all(torch.equal(own[name], t) for name, t in expected.items())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    in_and_out = 2 * 32 + 8, 6 * 32 + 8  # rows of 32 up to a multiple of 8 rows, and biases beside A
    padding = 3 * 2 * in_and_out[0] + (3 + 2) * in_and_out[1]
    assert sum(storages.values()) == 4 * (sum(p.numel() for p in plain.parameters()) + padding)
    for each, name in ((model, "stacked"), (plain, "plain")):
        each.save_pretrained(tmp_path / name)
    files = [next((tmp_path / name).glob("*.safetensors")) for name in ("stacked", "plain")]
    written, others = map(load_file, files)
    assert written.keys() == others.keys()
    assert all(torch.equal(written[name], t) for name, t in others.items())


def test_off_is_the_base_and_merged_and_unmerged_are_as_without(monkeypatch):
    (model, plain), inputs = stacked(), arguments()
    on = velocity(plain, inputs)
    for each in (model, plain):
        each.disable_adapters()
    assert groups(model) == [set()] * 3
    base = velocity(tiny_transformer(num_layers=3).double(), inputs)
    torch.testing.assert_close(velocity(model, inputs), base, rtol=1e-12, atol=1e-12)
    assert (base - on).norm() > 0.01 * on.norm()
    model.enable_adapters()
    for safe in (False, True):
        layers = [m for m in model.modules() if hasattr(m, "merge") and hasattr(m, "base_layer")]
        for layer in layers:
            layer.merge(safe_merge=safe)
        assert groups(model) == [set()] * 3
        torch.testing.assert_close(velocity(model, inputs), on, rtol=1e-9, atol=1e-9)
        for layer in layers:
            layer.unmerge()
        assert (groups(model) == [set()] * 3) == safe, "a safe merge gives the weights other memory"
        torch.testing.assert_close(velocity(model, inputs), on, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "config",
    [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}, {"target_modules": ["to_q", "to_out.0"]}],
)
def test_other_adapters_are_left_to_peft(config):
    model = tiny_transformer(num_layers=3).double()
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(**{"r": 2, "target_modules": TARGETS, "init_lora_weights": False} | config))
    model.eval()
    expected = velocity(model, arguments())
    model, _ = stacked(model=model)
    assert groups(model) == [{"video_out"} if "target_modules" in config else set()] * 3
    torch.testing.assert_close(velocity(model, arguments()), expected, rtol=1e-12, atol=1e-12)


def test_a_second_adapter_or_moved_weights_are_left_to_peft():
    (model, plain), inputs = stacked(), arguments()
    for each in (model, plain):
        torch.manual_seed(3)
        each.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False), "second")
        each.set_adapters(["default", "second"])
    assert groups(model) == [set()] * 3
    torch.testing.assert_close(velocity(model, inputs), velocity(plain, inputs), rtol=1e-12, atol=1e-12)
    (model, plain), inputs = stacked(), arguments(torch.float32)
    model.to(torch.float32)
    plain.to(torch.float32)
    change(model)
    change(plain)
    assert groups(model) == [set()] * 3
    torch.testing.assert_close(velocity(model, inputs), velocity(plain, inputs))


def test_a_sampling_copy_has_its_own_layers():
    (model, _), inputs = stacked(torch.float32), arguments(torch.float32)
    sampler = SamplingCopy(model)
    assert sampler.model.run_block is model.run_block
    assert groups(sampler.model) == [set()] * 3
    change(model)
    sampler.refresh()
    torch.testing.assert_close(velocity(sampler.model, inputs), velocity(model, inputs), rtol=1e-4, atol=1e-5)


def test_set_up_stacks_where_weights_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(speed, "choose_kernel", lambda *_: (None, "PyTorch's choice"))
    for settings, expected in (
        ({"attention_kernel": "flash"}, True),
        ({"gradient_checkpointing": True}, True),
        ({"gradient_checkpointing": True, "stream_weights": True}, False),
    ):
        model = model_with_adapter(torch.float32)
        set_up_blocks(model, Speed(**settings), CPU)
        assert (model.run_block.projections is not None) == expected


def test_one_compilation_serves_all_blocks_and_every_adapter():
    from torch._dynamo.testing import CompileCounter

    counter, (model, plain), inputs = CompileCounter(), stacked(), arguments()
    model.run_block = BlockRunner(
        compiler=lambda f: torch.compile(f, backend=counter, fullgraph=True),
        projections=model.run_block.projections,
    )
    for _ in range(2):
        torch.testing.assert_close(velocity(model, inputs), velocity(plain, inputs), rtol=1e-12, atol=1e-12)
        change(model)
        change(plain)
    assert counter.frame_count == 2, "before and after the attention"
    torch._dynamo.reset()


def test_the_activation_is_part_of_the_product_on_cuda_alone(monkeypatch):
    torch.manual_seed(0)
    ff, asked = FeedForward(8, activation_fn="gelu-approximate"), []
    x = torch.randn(2, 3, 8)

    def product(bias, rows, weight, use_gelu):
        asked.append((rows.shape, use_gelu))
        return torch.nn.functional.gelu(torch.addmm(bias, rows, weight), approximate="tanh")

    monkeypatch.setattr(projections, "PRODUCT_WITH_GELU", product)
    assert torch.equal(feed_forward(ff, x, {}), ff(x))
    assert asked == [], "on a CPU the operator has another activation"
    on_cuda = x.as_subclass(_LikeCuda)
    torch.testing.assert_close(feed_forward(ff, on_cuda, {}).as_subclass(torch.Tensor), ff(x))
    assert asked == [((6, 8), True)]
    assert torch.equal(feed_forward(ff, on_cuda, None).as_subclass(torch.Tensor), ff(x)), "with gradient"
    assert len(asked) == 1


class _LikeCuda(torch.Tensor):
    is_cuda = True


def test_projections_without_a_stack_are_those_of_the_modules():
    attn, x = model_with_adapter().transformer_blocks[0].attn, torch.randn(1, 4, 32, dtype=torch.float64)
    for found, layer in zip(project(attn, "video", x, None), (attn.to_q, attn.to_k, attn.to_v), strict=True):
        assert torch.equal(found, layer(x))
