"""Streamed weights: the same numbers, and only two blocks on the device, one of them ahead."""

import pytest
import torch
from adapted_model import arguments, assert_equal, gradients, model_with_adapter
from fake_stream import FakeStream

from rlhf.execution.blocks import BlockRunner
from rlhf.execution.offload import HostMemory
from rlhf.execution.weight_streaming import stream_blocks


def log_copies(stream):
    """Return a list that logs the blocks copied to the device from now on."""
    log, copy = [], stream._copy

    def logged(index):
        if stream._slot(index) is None:
            log.append(index)
        copy(index)

    stream._copy = logged
    return log


@pytest.mark.parametrize("num_layers", [1, 2, 3, 6])
@pytest.mark.parametrize("recompute", ["block", "all but attention"])
def test_gradients_are_the_same(recompute, num_layers):
    model, inputs = model_with_adapter(num_layers=num_layers), arguments()
    model.run_block = BlockRunner(recompute=recompute)
    expected = gradients(model, inputs)
    host = HostMemory("cpu", smallest_bytes=0)
    model.run_block = BlockRunner(recompute=recompute, host=host, fetch=stream_blocks(model, "cpu").fetch)
    for _ in range(2):
        found = gradients(model, inputs)
        assert found.keys() == expected.keys()
        assert all(torch.equal(grad, expected[name]) for name, grad in found.items())


def test_each_block_is_brought_once_in_each_direction_one_ahead():
    model, inputs = model_with_adapter(num_layers=5), arguments()
    stream = stream_blocks(model, "cpu")
    model.run_block = BlockRunner(recompute="all but attention", fetch=stream.fetch)
    log = log_copies(stream)
    with torch.no_grad():
        model(*inputs)
        assert log == [0, 1, 2, 3, 4, 0], "the last for the next pass"
        log.clear()
        model(*inputs)
    assert log == [1, 2, 3, 4, 0]
    log.clear()
    gradients(model, inputs)
    assert log == [1, 2, 3, 4, 0, 3, 2, 1, 0]


def test_two_blocks_are_on_the_device_and_the_rest_in_host_memory():
    model, inputs = model_with_adapter(num_layers=5), arguments()
    stream = stream_blocks(model, "cpu")
    model.run_block = BlockRunner(recompute="block", fetch=stream.fetch)
    gradients(model, inputs)
    slots = {slot.untyped_storage().data_ptr() for slot in stream.slots}
    places = [{p.untyped_storage().data_ptr() for p in block.parameters} for block in stream.blocks]
    assert sum(place <= slots for place in places) == 2
    frozen = sum(p.numel() * 8 for block in stream.blocks for p in block.parameters)
    assert sum(slot.numel() for slot in stream.slots) < 0.6 * frozen
    trained = [p for p in model.transformer_blocks.parameters() if p.requires_grad]
    assert not {p.untyped_storage().data_ptr() for p in trained} & (slots | set.union(*places))


def test_weights_are_unchanged_by_passing_through():
    model = model_with_adapter(num_layers=3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stream = stream_blocks(model, "cpu")
    model.run_block = BlockRunner(fetch=stream.fetch)
    with torch.no_grad():
        model(*arguments())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_blocks_trained_whole_stay_on_the_device():
    model, inputs = model_with_adapter(num_layers=3), arguments()
    model.transformer_blocks[1].requires_grad_(True)
    model.run_block = BlockRunner(recompute="block")
    expected = gradients(model, inputs)
    stream = stream_blocks(model, "cpu")
    assert stream.blocks[1].parameters == []
    model.run_block = BlockRunner(recompute="block", fetch=stream.fetch)
    assert_equal(gradients(model, inputs), expected, rtol=1e-12, atol=1e-14)


def test_on_an_accelerator_a_slot_is_filled_when_its_last_user_is_done_and_used_when_it_is_full(monkeypatch):
    model, log = model_with_adapter(num_layers=3), []
    stream = stream_blocks(model, "cpu")
    main, side = FakeStream("main", log), FakeStream("side", log)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: main)
    stream.stream = side
    stream.fetch(model.transformer_blocks[0])
    fill = ["side waits for main", "on side", "off side", "event"]
    assert log == [*fill, "main waits for event", *fill], "the first, and at once the second"
    log.clear()
    stream.fetch(model.transformer_blocks[1])
    assert log == ["main waits for event", *fill]
