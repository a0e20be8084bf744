"""Frozen weights that live in host memory: a block's are on the device while it runs, and the next block's on the way.

stream = stream_blocks(transformer, device)
transformer.run_block = BlockRunner(recompute="block", fetch=stream.fetch)
"""

from collections.abc import Iterable

import torch


def stream_blocks(transformer: torch.nn.Module, device: torch.device) -> "WeightStream":
    """The transformer's blocks as a stream; all the rest of it, and what is trained, is moved to the device.

    Afterwards the transformer must not be moved.
    """
    stream = WeightStream(transformer.transformer_blocks, device)
    for child in transformer.children():
        if child is not transformer.transformer_blocks:
            child.to(device)
    for p in transformer.transformer_blocks.parameters():
        if p.requires_grad:
            p.data = p.data.to(device)
    return stream


class WeightStream:
    """Two slots on the device, each of the size of the largest block, which blocks take in turn.

    A backward pass may only use a block's weights right after it was fetched again, so blocks have to be recomputed:
    a graph that outlives its block's turn would read another block's weights.

    Args:
        blocks: run in this order, or backwards. Their parameters that need no gradient are moved to the host.
    """

    def __init__(self, blocks: Iterable[torch.nn.Module], device: torch.device):
        self.device = torch.device(device)
        pin = self.device.type != "cpu"
        self.blocks = [_Block(block, pin) for block in blocks]
        self.number = {id(block.module): i for i, block in enumerate(self.blocks)}
        size = max(block.buffer.numel() for block in self.blocks)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self.holds: list[int | None] = [None, None]  # which block is in each slot
        self.arrived = [None, None]  # the event after which it is there
        self.stream = torch.Stream(device=self.device) if pin else None
        self.current = 0

    def fetch(self, module: torch.nn.Module) -> None:
        """Have the block's weights on the device, and start to bring the one after it, in the direction of travel."""
        number = self.number[id(module)]
        if number == self.current and self._slot(number) is not None:
            return  # the second half of a block
        backwards = number < self.current and (self.current, number) != (len(self.blocks) - 1, 0)
        self._bring(number)
        if (event := self.arrived[self._slot(number)]) is not None:
            torch.accelerator.current_stream(self.device).wait_event(event)
        self.current = number
        if len(self.blocks) > 1:
            self._bring(number - 1 if backwards and number else (number + 1) % len(self.blocks))

    def _slot(self, number: int) -> int | None:
        return self.holds.index(number) if number in self.holds else None

    def _bring(self, number: int) -> None:
        if self._slot(number) is not None:
            return
        slot = 1 if self.holds[0] == self.current else 0
        self._evict(slot)
        block = self.blocks[number]
        target = self.slots[slot][: block.buffer.numel()]
        if self.stream is None:
            target.copy_(block.buffer)
        else:
            self.stream.wait_stream(torch.accelerator.current_stream(self.device))  # the slot's last user is done
            with self.stream:
                target.copy_(block.buffer, non_blocking=True)
            self.arrived[slot] = self.stream.record_event()
        block.point_at(target)
        self.holds[slot] = number

    def _evict(self, slot: int) -> None:
        if self.holds[slot] is not None:
            block = self.blocks[self.holds[slot]]
            block.point_at(block.buffer)
            self.holds[slot] = None


class _Block:
    """A block's frozen parameters, one after the other in one piece of host memory."""

    def __init__(self, module: torch.nn.Module, pin: bool):
        self.module, self.parameters = module, [p for p in module.parameters() if not p.requires_grad]
        self.offsets, size = [], 0
        for p in self.parameters:
            self.offsets.append(size)
            size += -(-p.numel() * p.element_size() // 256) * 256  # each as well aligned as an allocation of its own
        self.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
        for p, view in zip(self.parameters, self._views(self.buffer), strict=True):
            view.copy_(p.data)
        self.point_at(self.buffer)

    def _views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        pairs = zip(self.parameters, self.offsets, strict=True)
        return [buffer[start:][: p.numel() * p.element_size()].view(p.dtype).view(p.shape) for p, start in pairs]

    def point_at(self, buffer: torch.Tensor) -> None:
        for p, view in zip(self.parameters, self._views(buffer), strict=True):
            p.data = view
