"""One plain training loop for every part of ContentV-nano.

At this size eager training is bound by kernel launches, so each whole step is captured in a graph where the device
has graphs.
"""

import json
import time
from collections.abc import Callable

import torch
from torch import nn

from rlhf.device import capture, has_graphs

STARTED = time.time()
LOGGED_EVERY = 500  # steps


def seconds() -> int:
    """Since the program started."""
    return round(time.time() - STARTED)


def log(**values) -> None:
    """One line of JSON on the screen."""
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
    """AdamW with warm-up and linear decay. With graphs, one is replayed on fixed tensors.

    Args:
        name: of the stage, in the log.
        learning_rate: the peak, after 200 steps.
        batch: () -> tensors of fixed shapes.
        loss_fn: (*batch) -> scalar loss; must not read values back to the host.
        ema: (averaged parameters, live parameters), averaged at 0.997 per step.
    """
    device = params[0].device
    rate = torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(
        params,
        lr=rate,
        weight_decay=0.01,
        betas=(0.9, 0.98),
        fused=device.type != "cpu",
        capturable=has_graphs(device),
    )
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
    replay = capture(step, reset) if has_graphs(device) else lambda: (reset(), step())[1]
    started = time.time()
    for i in range(steps):
        rate.fill_(learning_rate * min(1.0, (i + 1) / 200) * max(0.02, 1 - i / steps))
        for target, source in zip(static, batch(), strict=True):
            target.copy_(source)
        loss = replay()
        if i % LOGGED_EVERY == 0 or i == steps - 1:
            log(
                stage=name,
                step=i,
                loss=round(loss.item(), 4),
                step_ms=round(1000 * (time.time() - started) / (i + 1), 1),
            )
