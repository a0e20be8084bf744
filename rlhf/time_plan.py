"""The seconds of an optimizer step: how often each part runs, times what it computes and moves at a device's rates.

The work of a part is counted operator by operator on tensors without storage (`rlhf.trace`); an operator takes the time
of its products or of its memory traffic, whichever is longer (the roofline of Williams et al. 2009), and a part at
least the time that Python needs to call it. Rewards take what was measured of them. Not in it: `compile_blocks`,
`sampling_weights` and `base_bits`, whose time is taken to be that of the plain way.
"""

import dataclasses
import math
from dataclasses import dataclass

from rewards.measured import DEVICE as DEVICE_OF_REWARDS
from rlhf.config import RewardGradientConfig
from rlhf.memory_plan import Rewards, graded_branches, together, window_steps
from rlhf.parts import Parts
from rlhf.rates import Rates, known_rates
from rlhf.trace import Phase

# Python around an operator's call: modules, hooks, adapters. From eight settings of nano on an H200, 1.23 to 1.75.
AROUND_A_CALL = 1.5
ADAM_BYTES = 36  # moved for a trained number: read four, write three, and the copy for the forward pass


@dataclass(frozen=True)
class Calls:
    """Of the transformer, for one video and optimizer step; on average, where rollouts are used again."""

    prefix: float  # without gradient, before the window
    constant: float  # without gradient, in the window or for the drift
    graded: float  # with gradient


@dataclass(frozen=True)
class TimePlan:
    """Seconds of one optimizer step."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.parts.values())


def count_calls(args: RewardGradientConfig) -> Calls:
    """At most, where a method draws its steps. args has all sampling keys set."""
    again = args.num_draws if args.method in ("draft_lv", "srpo") else 0
    window, guided, drift = window_steps(args), args.guidance_scale > 1, bool(args.drift_weight)
    branches, with_gradient = 2 if guided and args.guidance_gradient != "distill" else 1, graded_branches(args)
    steps = window + again + drift
    constant = (branches - with_gradient) * steps + (2 if guided else 1) * drift
    before = min(args.num_inference_steps - window, args.prefix_steps or args.num_inference_steps)
    prefix = before + (branches - 1) * math.ceil(before / args.guidance_every)
    return Calls(prefix / args.rollout_uses, constant, with_gradient * steps)


def plan_time(parts: Parts, args: RewardGradientConfig, rewards: Rewards, rates: Rates) -> TimePlan:
    """Of all `gradient_accumulation_steps`; args: as those of parts, but for settings about speed and memory."""
    batch, at_once = args.per_device_train_batch_size, together(args)
    branch, calls = parts.branch(args, batch * at_once), count_calls(args)
    decoder = parts.decoder(args, batch, rewards.frames)
    weights = _streamed(parts, args)
    forward = at_least_moved(seconds(branch.sampling, rates), weights, rates)
    there = seconds(branch.forward, rates) + (forward if args.stepwise_backward else 0)
    back = seconds(branch.backward, rates)
    kept = _offloaded(parts, args, batch * at_once)
    segment = at_least_moved(there, weights + kept, rates) + at_least_moved(back, weights + kept, rates)
    samples = args.num_draws if args.method == "srpo" else 1 + args.num_draws * (args.method == "draft_lv")
    scoring = reward_seconds(rewards, rates) * (2 if args.relative_words else 1)
    micro = {
        "sampling": (calls.prefix + calls.constant) / at_once * forward,
        "gradient segment": calls.graded / at_once * segment,
        "decoding and back": samples * (seconds(decoder.forward, rates) + seconds(decoder.backward, rates)),
        "reward and back": samples * scoring,
    }
    times = {name: args.gradient_accumulation_steps * value for name, value in micro.items()}
    return TimePlan(times | {"optimizer": parts.trained * ADAM_BYTES / rates.bytes})


def seconds(phase: Phase, rates: Rates) -> float:
    """Of the device, or of calling it if that takes longer; one after the other where the device is the CPU."""
    on_device = sum(count * rates.seconds(operation) for operation, count in phase.work.items())
    calling = phase.calls * rates.call_seconds + phase.calls_of_autograd * rates.autograd_seconds
    return on_device + calling if rates.waits else max(on_device, AROUND_A_CALL * calling)


def at_least_moved(computing: float, size: int, rates: Rates) -> float:
    """Copies between host and device run beside the computation."""
    return computing if rates.link is None else max(computing, size / rates.link)


def reward_seconds(rewards: Rewards, rates: Rates) -> float:
    """As measured; on another device in proportion to its products."""
    reference = known_rates(DEVICE_OF_REWARDS)
    slower = 1.0
    if reference and rates.device != reference.device:
        slower = reference.speed("matrix", "float32") / rates.speed("matrix", "float32")
    traced = sum(seconds(part.forward, rates) + seconds(part.backward, rates) for part in rewards.traced)
    return slower * rewards.seconds + traced


def _streamed(parts: Parts, args: RewardGradientConfig) -> int:
    return parts.frozen[0] * parts.transformer.dtype.itemsize if args.stream_weights else 0


def _offloaded(parts: Parts, args: RewardGradientConfig, batch: int) -> int:
    """Bytes that leave the device in a forward pass, and come back."""
    if not args.offload_activations:
        return 0
    plain = parts.branch(dataclasses.replace(args, offload_activations=False), batch)
    return plain.kept - parts.branch(args, batch).kept
