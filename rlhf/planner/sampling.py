"""Choose where the parts of a model are while it samples, so that a device's memory is enough."""

import math
from dataclasses import dataclass

import torch

from rlhf.config import RewardGradientConfig
from rlhf.device import describe, non_pytorch_memory
from rlhf.evaluation.sampler import TEXTS, Placement
from rlhf.generator.files import SamplingDefaults
from rlhf.generator.registry import family_of_config
from rlhf.planner.text_encoders import encoder_configs, encoding_bytes
from rlhf.planner.time import RATES
from rlhf.planner.traced import TracedModel

GIB = 2**30
# The fastest first: copies hide behind a long video's steps, and encoders on a CPU take longest.
PLACEMENTS = (Placement(), Placement("in turn"), Placement("in turn", True), Placement("host", True))


@dataclass(frozen=True)
class SamplingPlan:
    """A placement and the peak bytes of each phase on the device, the context included."""

    placement: Placement
    phases: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """Peak bytes on the device."""
        return max(self.phases.values())

    def __str__(self) -> str:
        """Return a line with the placement and the peak GiB of each phase."""
        peaks = ", ".join(f"{name} {size / GIB:.1f}" for name, size in self.phases.items())
        return f"{self.placement}; GiB expected: {peaks}"


def plan_sampling(
    model: str, card: dict[str, dict], encoders: dict[str, dict], sampling: SamplingDefaults, context: int = 0
) -> list[SamplingPlan]:
    """Return a plan for each placement, the fastest first.

    card: as `model_sizes` returns it. encoders: as `encoder_configs` returns them. context: the
    bytes outside of PyTorch, as `context_bytes` returns them. An adapter is counted at the default
    rank.
    """
    settings = sampling.call_arguments()
    args = RewardGradientConfig(model=model, decode_chunk=1, **settings)
    traced = TracedModel(args, card)
    family, dtype = family_of_config(card["transformer"]), traced.transformer.dtype
    tokens = family.encoder_tokens(card, sampling.max_sequence_length)
    classes = family.classes.text_encoders
    sizes = lambda batch: [
        encoding_bytes(classes, {name: config}, tokens, dtype, batch) for name, config in encoders.items()
    ]
    alone, weights = sizes(TEXTS), sizes(0)  # of each encoder: while it runs, and at rest
    step = traced.transformer_call(args, 1, with_gradient=False).no_grad.added_bytes
    decode = traced.decoder_call(args, 1, sampling.num_frames, with_gradient=False).no_grad.added_bytes
    vae = 4 * traced.vae.num_parameters()
    frozen, itemsize = traced.frozen, traced.itemsize
    table = traced.transformer.position_bytes(traced.num_tokens)
    around = itemsize * frozen.rest + traced.adapter_bytes + table
    plans = []
    for placement in PLACEMENTS:
        blocks = itemsize * (2 * frozen.largest_block if placement.stream_weights else frozen.blocks)
        held, is_whole = context + blocks + around, placement.encoders == "device"
        held += sum(weights) + vae if is_whole else 0
        # A video after the first: streamed blocks keep their slots, a whole transformer makes room.
        before = held if is_whole or placement.stream_weights else context
        running = {"device": max(a - w for a, w in zip(alone, weights, strict=True)), "in turn": max(alone), "host": 0}
        phases = {"encoding": before + running[placement.encoders], "denoising": held + step}
        phases["decoding"] = held + (0 if is_whole else vae) + decode
        plans.append(SamplingPlan(placement, phases))
    return plans


def fit_sampling(
    model: str,
    card: dict[str, dict],
    sampling: SamplingDefaults,
    device: torch.device,
    limit_gib: float | None,
    chosen: SamplingPlan | None = None,
) -> SamplingPlan | None:
    """Return the fastest plan for a device within a limit; None without a limit.

    chosen: the plan with which the model was loaded. Its placement is kept. Raises ValueError on a
    CPU, where there is nothing to move, and if no plan fits.
    """
    if limit_gib is None:
        return None
    if device.type == "cpu":
        got = f"memory_limit_gib: got {limit_gib:g} on a CPU"
        raise ValueError(f"{got}, expected an accelerator, whose memory it limits; leave it out")
    plans = plan_sampling(model, card, encoder_configs(model), sampling, context_bytes(device))
    return choose_plan([plan for plan in plans if chosen is None or plan.placement == chosen.placement], limit_gib)


def context_bytes(device: torch.device) -> int:
    """Return the device memory in bytes that a process takes outside of PyTorch.

    For devices in `RATES` the value is stored. For others it is read from the device.
    """
    rates = RATES.get(describe(device))
    return rates.context_bytes if rates else non_pytorch_memory(device)


def choose_plan(plans: list[SamplingPlan], limit_gib: float) -> SamplingPlan:
    """Return the fastest plan within the limit. Raise ValueError if there is none."""
    if not (math.isfinite(limit_gib) and limit_gib > 0):
        raise ValueError(f"memory_limit_gib: got {limit_gib}, expected more than 0; raise it")
    for plan in plans:
        if plan.peak_bytes <= limit_gib * GIB:
            return plan
    least = min(plans, key=lambda plan: plan.peak_bytes)
    phase = max(least.phases, key=least.phases.get)
    raise ValueError(
        f"memory_limit_gib: got {limit_gib:g}, expected at least {math.ceil(10 * least.peak_bytes / GIB) / 10:g} for "
        f"{phase} ({least.placement}); raise it, or lower num_frames, height and width"
    )
