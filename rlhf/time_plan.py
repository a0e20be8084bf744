"""The seconds of an optimizer step: how often each part runs, times what it computes and moves at a device's rates.

The work of a part is counted operator by operator on tensors without storage (`rlhf.trace`); an operator takes the time
of its products or of its memory traffic, whichever is longer (the roofline of Williams et al. 2009), and a part at
least the time that Python needs to call it. Rewards take what was measured of them. Not in it: `compile_blocks`,
`sampling_weights` and `base_bits`, whose time is taken to be that of the plain way.
"""

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass

from rewards.measured import DEVICE as DEVICE_OF_REWARDS
from rlhf.config import RewardGradientConfig
from rlhf.memory_plan import Rewards, branches_with_gradient, run_branches, together
from rlhf.method.options import read_options
from rlhf.parts import Parts, window_steps
from rlhf.rates import Rates, known_rates
from rlhf.trace import Operation, Phase

# Python around an operator's call: modules, hooks, adapters. From eight settings of nano on an H200, 1.26 to 1.78.
AROUND_A_CALL = 1.5
ADAM_BYTES = 36  # moved for a trained number: read four, write three, and the copy for the forward pass


@dataclass(frozen=True)
class Calls:
    """Calls of the transformer in one process for a video and step; on average, where rollouts are used again."""

    prefix: float  # without gradient, before the window
    constant: float  # without gradient, in the window or for the drift
    with_gradient: float


@dataclass(frozen=True)
class TimePlan:
    """Seconds of one optimizer step."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds of all parts together."""
        return sum(self.parts.values())


def count_calls(args: RewardGradientConfig) -> Calls:
    """How often a step calls the transformer; at most, where steps are drawn. args has all sampling keys set."""
    again = getattr(read_options(args.method, args.method_kwargs), "num_draws", 0)
    window, of_base, drift = window_steps(args), run_branches(args), bool(args.drift_weight)
    branches, with_gradient = 1 if args.guidance_gradient == "distill" else of_base, branches_with_gradient(args)
    steps = window + again + drift
    constant = (branches - with_gradient) * steps + of_base * drift
    before = min(args.num_inference_steps - window, args.prefix_steps or args.num_inference_steps)
    prefix = before + (branches - 1) * math.ceil(before / args.guidance_every)
    return Calls(prefix / args.rollout_reuse, constant, with_gradient * steps)


def plan_time(parts: Parts, args: RewardGradientConfig, rewards: Rewards, rates: Rates) -> TimePlan:
    """The time of an optimizer step, with all its `gradient_accumulation_steps`.

    args: as those of parts, but for settings about speed and memory.
    """
    batch, at_once = args.per_device_train_batch_size, together(args)
    branch, calls = parts.branch(args, batch * at_once), count_calls(args)
    decoder = parts.decoder(args, batch, rewards.frames)
    beside = _moved_beside(parts, args, rates)
    kept = _offloaded(parts, args, batch * at_once) / rates.link if rates.link else 0
    forward = max(seconds(branch.sampling, rates), beside)
    there = seconds(branch.forward, rates) + (forward if args.stepwise_backward else 0)
    segment = max(there, beside + kept) + max(seconds(branch.backward, rates), beside + kept)
    options = read_options(args.method, args.method_kwargs)
    draws = getattr(options, "num_draws", 0)
    samples = draws if args.method == "srpo" else 1 + draws
    scoring = reward_seconds(rewards, rates) * (2 if options.relative_words else 1)
    micro = {
        "sampling": (calls.prefix + calls.constant) / at_once * forward,
        "gradient segment": calls.with_gradient / at_once * segment,
        "decoding and back": samples * (seconds(decoder.forward, rates) + seconds(decoder.backward, rates)),
        "reward and back": samples * scoring,
    }
    times = {name: args.gradient_accumulation_steps * value for name, value in micro.items()}
    return TimePlan(times | {"optimizer": _optimizer(parts, rates)})


def seconds(phase: Phase, rates: Rates) -> float:
    """Seconds of the device, or of calling it if that takes longer; of both where the device is the CPU."""
    on_device = sum(count * rates.seconds(operation) for operation, count in phase.work.items())
    calling = phase.calls * rates.call_seconds + phase.calls_of_autograd * rates.autograd_seconds
    return on_device + calling if rates.waits else max(on_device, AROUND_A_CALL * calling)


def reward_seconds(rewards: Rewards, rates: Rates) -> float:
    """Seconds of scoring and going back: as measured; on another device in proportion to its products."""
    reference = known_rates(DEVICE_OF_REWARDS)
    slower = 1.0
    if reference and rates.device != reference.device:
        slower = reference.speed("matrix", "float32") / rates.speed("matrix", "float32")
    traced = sum(seconds(part.forward, rates) + seconds(part.backward, rates) for part in rewards.traced)
    return slower * rewards.seconds + traced


def _optimizer(parts: Parts, rates: Rates) -> float:
    """Adding up the gradients of all processes, Adam, and a copy for each trained tensor."""
    update = Operation("other", "float32", 0, parts.trained * ADAM_BYTES)
    added_up = _sent(2 * 4 * parts.trained, parts.processes) / rates.to_others
    return added_up + seconds(Phase(0, work=Counter([update]), calls=parts.trained_tensors), rates)


def _moved_beside(parts: Parts, args: RewardGradientConfig, rates: Rates) -> float:
    """Seconds of bringing the weights to the device for one pass, while it computes: from the host or other devices."""
    blocks, size = parts.frozen[0], parts.transformer.dtype.itemsize
    if args.stream_weights and rates.link:
        return blocks * size / rates.link
    return _sent(blocks * size, parts.processes) / rates.to_others if args.shard_base else 0


def _sent(size: int, processes: int) -> float:
    """Bytes that each process sends, for all to have so many of which each has a part."""
    return size * (processes - 1) / processes


def _offloaded(parts: Parts, args: RewardGradientConfig, batch: int) -> int:
    """Bytes that leave the device in a forward pass, and come back."""
    if not args.offload_activations:
        return 0
    plain = parts.branch(dataclasses.replace(args, offload_activations=False), batch)
    return plain.kept - parts.branch(args, batch).kept
