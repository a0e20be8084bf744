"""Weight streaming: frozen weights stay in host memory and are copied to the device block by block.

While a block runs, the weights of the next block are copied.

stream = stream_blocks(transformer, device)
transformer.run_block = BlockRunner(recompute="block", fetch=stream.fetch)
"""

from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import accumulate

import torch

from rlhf.device import drop_file_pages
from rlhf.execution.offload import ALIGNMENT, HostBuffers

COPY_THREADS = 4  # that read weights from a file's pages


def stream_blocks(transformer: torch.nn.Module, device: torch.device) -> "WeightStream":
    """Move the blocks' frozen weights to host memory; return the stream that fetches them.

    Everything else and all trained weights are moved to the device. Afterwards the transformer must
    not be moved. Host memory holds one copy: a block's old weights are given up once copied.
    """
    stream = WeightStream(transformer.transformer_blocks, device)
    for child in transformer.children():
        if child is not transformer.transformer_blocks:
            child.to(device)
    for p in transformer.parameters(recurse=False):
        p.data = p.data.to(device)
    for p in transformer.transformer_blocks.parameters():
        if p.requires_grad:
            p.data = p.data.to(device)
    return stream


class WeightStream:
    """Two slots on the device, as large as the largest block, for frozen weights of host memory.

    Blocks have to be recomputed in the backward pass: a graph that is kept longer would read the
    weights of another block.

    Args:
        blocks: run in this order, or backwards. Their frozen parameters are moved to the host.
    """

    def __init__(self, blocks: Iterable[torch.nn.Module], device: torch.device):
        self.device = torch.device(device)
        pin_memory = self.device.type != "cpu"
        self.blocks = [_HostBlock(block) for block in blocks]
        buffers = HostBuffers(pin_memory, sum(block.size for block in self.blocks))
        with ThreadPoolExecutor(COPY_THREADS) as pool:
            for block in self.blocks:
                block.move_to(buffers, pool)
        self.indices = {id(block.module): i for i, block in enumerate(self.blocks)}
        size = max(block.size for block in self.blocks)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self.holds: list[int | None] = [None, None]  # the block in each slot
        self.arrived = [None, None]  # the event after which the slot is filled
        self.stream = torch.Stream(device=self.device) if pin_memory else None
        self.current = 0

    def fetch(self, module: torch.nn.Module) -> None:
        """Put the block's weights on the device, and start to copy the next block's.

        The next block is the one after or before, by the direction of the last two calls.
        """
        index = self.indices[id(module)]
        if index == self.current and self._slot(index) is not None:
            return  # the second half of a block
        backwards = index < self.current and (self.current, index) != (len(self.blocks) - 1, 0)
        self._copy(index)
        if (event := self.arrived[self._slot(index)]) is not None:
            torch.accelerator.current_stream(self.device).wait_event(event)
        self.current = index
        if len(self.blocks) > 1:
            self._copy(index - 1 if backwards and index else (index + 1) % len(self.blocks))

    def _slot(self, index: int) -> int | None:
        """Return the slot of a block, None if it is not on the device."""
        return self.holds.index(index) if index in self.holds else None

    def _copy(self, index: int) -> None:
        """Start to copy a block to the slot that the current block does not use."""
        if self._slot(index) is not None:
            return
        slot = 1 if self.holds[0] == self.current else 0
        if self.holds[slot] is not None:
            self.blocks[self.holds[slot]].leave_device()
        block, target = self.blocks[index], self.slots[slot]
        if self.stream is None:
            block.copy_to(target)
        else:
            self.stream.wait_stream(torch.accelerator.current_stream(self.device))  # the slot's last user is done
            with self.stream:
                block.copy_to(target)
            self.arrived[slot] = self.stream.record_event()
        block.read_from(target)
        self.holds[slot] = index


class _HostBlock:
    """A block's frozen parameters in buffers of host memory, in few contiguous runs.

    A slot on the device holds them one after the other, at `offsets`.
    """

    def __init__(self, module: torch.nn.Module):
        self.module, self.parameters = module, [p for p in module.parameters() if not p.requires_grad]
        self.sizes = [-(-p.numel() * p.element_size() // ALIGNMENT) * ALIGNMENT for p in self.parameters]
        self.offsets = [0, *accumulate(self.sizes)]
        self.size = self.offsets.pop()

    def move_to(self, buffers: HostBuffers, pool: Executor) -> None:
        """Move the weights into host buffers, copied by a pool's threads; wait for all of them."""
        old = [p.data for p in self.parameters]
        pieces = [buffers.take(size) for size in self.sizes]
        self.runs = []  # offsets, and what lies there
        for offset, piece in zip(self.offsets, pieces, strict=True):
            if self.runs and _are_adjacent(before := self.runs[-1][1], piece):
                self.runs[-1] = self.runs[-1][0], before.as_strided((before.numel() + piece.numel(),), (1,))
            else:
                self.runs.append((offset, piece))
        self.home = [_view_like(p, piece) for p, piece in zip(self.parameters, pieces, strict=True)]
        list(pool.map(torch.Tensor.copy_, self.home, old))
        self.leave_device()
        drop_file_pages(old)

    def copy_to(self, slot: torch.Tensor) -> None:
        """Start to copy the weights to a slot, and have the parameters read them there."""
        for offset, run in self.runs:
            slot[offset : offset + run.numel()].copy_(run, non_blocking=True)

    def read_from(self, slot: torch.Tensor) -> None:
        """Make the parameters views of a slot of device memory that holds the block's weights."""
        for p, offset in zip(self.parameters, self.offsets, strict=True):
            p.data = _view_like(p, slot[offset:])

    def leave_device(self) -> None:
        """Let the parameters read their weights from host memory."""
        for p, home in zip(self.parameters, self.home, strict=True):
            p.data = home


def _are_adjacent(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether `second` begins where `first` ends, in one storage."""
    storages = {x.untyped_storage().data_ptr() for x in (first, second)}
    return len(storages) == 1 and first.storage_offset() + first.numel() == second.storage_offset()


def _view_like(p: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """Return the first bytes of data as a view with the dtype and shape of p."""
    return data[: p.numel() * p.element_size()].view(p.dtype).view(p.shape)
