"""Streamed weights: the same numbers, and only two blocks on the device, one of them ahead."""

from pathlib import Path

import pytest
import torch
from adapted_model import arguments, assert_equal, gradients, model_with_adapter
from fake_stream import FakeStream
from mapped import Allocations, is_mapped
from tiny import tiny_transformer
from tiny_wan import tiny_wan_transformer

from rlhf.adapter.lora import add_adapter, lora_config
from rlhf.config import RewardGradientConfig
from rlhf.device import drop_file_pages
from rlhf.execution.blocks import BlockRunner
from rlhf.execution.offload import ALIGNMENT, HostBuffers, HostMemory, host_bytes
from rlhf.execution.weight_streaming import stream_blocks
from rlhf.generator.loading import load_transformer


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


@pytest.mark.parametrize("make", [tiny_transformer, tiny_wan_transformer])
def test_host_memory_holds_one_copy_of_the_blocks_from_file_to_device(make, tmp_path):
    make(num_layers=6).save_pretrained(tmp_path / "transformer")
    with Allocations() as made:
        model = load_transformer(tmp_path)
        assert all(map(is_mapped, model.parameters())), "no copy yet"
        add_adapter(model, lora_config(RewardGradientConfig(lora_rank=2)), 0)
        before = made.bytes
        stream = stream_blocks(model, torch.device("cpu"))
    frozen = [p for p in model.transformer_blocks.parameters() if not p.requires_grad]
    weights = sum(-(-p.nbytes // ALIGNMENT) * ALIGNMENT for p in frozen)
    slots = sum(slot.nbytes for slot in stream.slots)
    assert not any(map(is_mapped, frozen))
    assert weights <= made.bytes - before - slots <= 1.05 * weights + ALIGNMENT


def test_pages_of_a_file_leave_the_process_and_come_back_as_they_were(tmp_path):
    (tmp_path / "numbers").write_bytes(torch.arange(2**20, dtype=torch.float64).numpy().tobytes())
    numbers = torch.from_file(str(tmp_path / "numbers"), False, 2**20, dtype=torch.float64)
    first, second = numbers[:300], numbers[300:]
    first[299] = -1.0  # on a page with the second's beginning

    def resident() -> int:
        rows = iter(Path("/proc/self/smaps").read_text().splitlines())
        next(row for row in rows if row.endswith(str(tmp_path / "numbers")))
        return int(next(row for row in rows if row.startswith("Rss:")).split()[1]) * 1024

    assert second.sum() > 0
    assert resident() == numbers.nbytes
    drop_file_pages([second, torch.ones(10**5)])
    assert resident() <= 2 * 4096
    assert first[299] == -1.0
    assert torch.equal(second, torch.arange(300, 2**20, dtype=torch.float64))


def test_buffers_share_allocations_of_powers_of_two_and_never_overlap():
    block = [47_316_992] * 4 + [11_829_248] * 8 + [70_975_488] * 2 + [4864] * 20  # ContentV-8B's, about
    sizes = block * 38
    assert sum(sizes) < host_bytes(sizes, expected=True) < 1.02 * sum(sizes)
    assert host_bytes([size - 100 for size in sizes]) < 1.05 * sum(sizes)
    alone = sum(1 << (size - 1).bit_length() for size in sizes)
    assert alone > 1.25 * sum(sizes)
    buffers = HostBuffers(pin_memory=False)
    taken = [buffers.take(size) for size in (1000, 3 * 10**7, 10, 10**6, 10)]
    for i, buffer in enumerate(taken):
        buffer.fill_(i)
    assert [buffer.numel() for buffer in taken] == [1000, 3 * 10**7, 10, 10**6, 10]
    assert all((buffer == i).all() for i, buffer in enumerate(taken))
    assert {buffer.storage_offset() % ALIGNMENT for buffer in taken} == {0}
    assert all(slab.numel().bit_count() == 1 for slab in buffers.slabs)
