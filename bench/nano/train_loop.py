"""The training loop of every part of ContentV-nano.

Eager training at this size is bound by kernel launches. So the whole step is captured in a graph,
on devices that have graphs.
"""

import json
import time
from collections.abc import Callable

import torch
from torch import nn

STARTED = time.time()
LOG_STEPS = 500


def seconds() -> int:
    """Return the seconds since the program started."""
    return round(time.time() - STARTED)


def log(**values) -> None:
    """Print one line of JSON."""
    print(json.dumps({"seconds": seconds()} | values), flush=True)


def train(
    name: str,
    steps: int,
    params: list[torch.Tensor],
    learning_rate: float,
    batch: Callable[[], tuple[torch.Tensor, ...]],
    loss_fn: Callable[..., torch.Tensor],
    ema: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None,
) -> None:
    """Train by AdamW with warm-up over 200 steps and linear decay.

    name: of the stage, for the log. batch: returns tensors of fixed shapes. loss_fn: (*batch) ->
    scalar loss; must not read values back to the host. ema: (averaged parameters, live parameters),
    with decay 0.997 a step.
    """
    device = params[0].device
    rate = torch.zeros((), device=device)
    has_graphs = device.type == "cuda"
    kind = {"fused": device.type != "cpu", "capturable": has_graphs}
    optimizer = torch.optim.AdamW(params, lr=rate, weight_decay=0.01, betas=(0.9, 0.98), **kind)
    static = batch()

    def step():
        loss = loss_fn(*static)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimizer.step()
        if ema is not None:
            with torch.no_grad():
                torch._foreach_lerp_(ema[0], ema[1], 0.003)
        return loss.detach()

    reset = lambda: optimizer.zero_grad(set_to_none=True)
    replay = capture(step, reset) if has_graphs else lambda: (reset(), step())[1]
    started = time.time()
    for i in range(steps):
        rate.fill_(learning_rate * min(1.0, (i + 1) / 200) * max(0.02, 1 - i / steps))
        for target, source in zip(static, batch(), strict=True):
            target.copy_(source)
        loss = replay()
        if i % LOG_STEPS == 0 or i == steps - 1:
            milliseconds = 1000 * (time.time() - started) / (i + 1)
            log(stage=name, step=i, loss=round(loss.item(), 4), step_ms=round(milliseconds, 1))


def capture(step: Callable[[], torch.Tensor], reset: Callable[[], None]) -> Callable[[], torch.Tensor]:
    """Capture a training step as one graph, after a warm-up on a side stream.

    Args:
        step: works on fixed tensors, copies nothing to the host, and returns its result.
        reset: drops the gradients of a step.

    Returns:
        A function that replays the graph and returns the step's result, always the same tensor.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            reset()
            step()
    torch.cuda.current_stream().wait_stream(side)
    reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay
