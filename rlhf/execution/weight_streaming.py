"""Weight streaming: frozen weights stay in host memory and are copied to the device block by block.

While a block runs, the weights of the next block are copied.

stream = stream_blocks(transformer, device)
transformer.run_block = BlockRunner(recompute="block", fetch=stream.fetch)
"""

from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor

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
                block.move_to(buffers.take(block.size), pool)
        self.indices = {id(block.module): i for i, block in enumerate(self.blocks)}
        size = max(block.buffer.numel() for block in self.blocks)
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
            evicted = self.blocks[self.holds[slot]]
            evicted.point_at(evicted.buffer)
        block = self.blocks[index]
        target = self.slots[slot][: block.buffer.numel()]
        if self.stream is None:
            target.copy_(block.buffer)
        else:
            self.stream.wait_stream(torch.accelerator.current_stream(self.device))  # the slot's last user is done
            with self.stream:
                target.copy_(block.buffer, non_blocking=True)
            self.arrived[slot] = self.stream.record_event()
        block.point_at(target)
        self.holds[slot] = index


class _HostBlock:
    """A block whose frozen parameters lie one after the other in one buffer of host memory."""

    def __init__(self, module: torch.nn.Module):
        self.module, self.parameters = module, [p for p in module.parameters() if not p.requires_grad]
        self.offsets, self.size = [], 0
        for p in self.parameters:
            self.offsets.append(self.size)
            self.size += -(-p.numel() * p.element_size() // ALIGNMENT) * ALIGNMENT

    def move_to(self, buffer: torch.Tensor, pool: Executor) -> None:
        """Copy the weights to a buffer of `size` bytes by several threads; drop the old ones."""
        self.buffer, old = buffer, [p.data for p in self.parameters]
        list(pool.map(torch.Tensor.copy_, self._views(buffer), old))
        self.point_at(buffer)
        drop_file_pages(old)

    def _views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Return a view of the buffer for each parameter."""
        pairs = zip(self.parameters, self.offsets, strict=True)
        return [buffer[start:][: p.numel() * p.element_size()].view(p.dtype).view(p.shape) for p, start in pairs]

    def point_at(self, buffer: torch.Tensor) -> None:
        """Let the parameters read their weights from a buffer."""
        for p, view in zip(self.parameters, self._views(buffer), strict=True):
            p.data = view
