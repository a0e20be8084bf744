"""Time of an optimizer step, estimated from operation counts and a device's speeds.

The estimates are within 35 % of the measured times.

An operator takes as long as its FLOPs or its memory traffic, whichever takes longer (the roofline
model of Williams et al. 2009). A call takes at least as long as Python needs to launch its
operators. The times of rewards are measured. Left out: `compile_blocks`, the slowdown of 4-bit
weights, evaluations, samples and checkpoints.
"""

import dataclasses
from dataclasses import dataclass

from rlhf.config import RewardGradientConfig
from rlhf.method.options import SCORES_ALONE, is_offline, read_options
from rlhf.planner.memory import RewardNeeds, branches_per_batch, branches_per_rank, grad_branches_per_rank
from rlhf.planner.traced import TracedCall, TracedModel, max_grad_steps
from rlhf.planner.tracer import Operation, Phase

ACCURACY = 0.35  # largest relative error of a step's seconds; tests compute it from bench/results
ADAM_BYTES = 36  # moved for a trained parameter: reads, writes, and the copy for the forward pass


@dataclass(frozen=True)
class Rates:
    """Speeds of a device: FLOP/s by operator kind and number format, and bytes/s."""

    flops: dict[str, float]
    memory_bandwidth: float  # of an elementwise operator, reads and writes
    host_bandwidth: float
    peer_bandwidth: float  # to the next device
    context_bytes: int  # device memory that a process takes besides PyTorch's
    launch_seconds: float = 14e-6  # of one operator, from Python; fitted to nano on an H200

    def operation_seconds(self, operation: Operation) -> float:
        """Return an operation's seconds by the roofline model."""
        bandwidth = self.peer_bandwidth if operation.kind == "collective" else self.memory_bandwidth
        flops = self.flops.get(f"{operation.kind} {operation.dtype}", self.flops["matrix float32"])
        return max(operation.flops / flops, operation.bytes / bandwidth)


# Measured by bench/planner.py.
H200 = Rates(
    flops={
        "matrix float32": 4.995e13,
        "conv float32": 3.398e14,
        "attention float32": 3.552e13,
        "matrix bfloat16": 7.617e14,
        "conv bfloat16": 4.492e14,
        "attention bfloat16": 4.832e14,
    },
    memory_bandwidth=1.685e12,
    host_bandwidth=5.403e10,
    peer_bandwidth=3.856e11,
    context_bytes=806158336,
)
RATES = {
    "NVIDIA H200": H200,
    # The same chip with slower memory: by the data sheets 3.35 TB/s instead of 4.8. Not measured.
    "NVIDIA H100 80GB HBM3": dataclasses.replace(H200, memory_bandwidth=1.685e12 * 3.35 / 4.8),
}


@dataclass(frozen=True)
class CallCounts:
    """Transformer calls of one rank, for one video and one optimizer step.

    If rollouts are reused, the counts are averages.
    """

    prefix: float  # no-grad steps before the window
    constant: float  # calls without gradient in the window, and those of the drift
    with_gradient: float


def count_calls(args: RewardGradientConfig) -> CallCounts:
    """Return how often a step calls the transformer.

    If a method draws its steps at random, the count is that of the costliest draw.
    """
    options, window = read_options(args.method, args.method_kwargs), max_grad_steps(args)
    draws = getattr(options, "num_draws", 0)
    levels = getattr(options, "num_levels", 0)  # each by both policies
    leaps, adjoint = 2 * (args.method == "leap_align"), _adjoint_steps(args)
    stochastic, kl_steps = _stochastic_steps(args)
    has_drift, of_negative = bool(args.drift_weight), bool(options.negative_drift_weight)
    # The adjoint takes the base's gradient at all of its steps but the first, where it ends.
    grad_steps = window + draws + levels + leaps + stochastic + adjoint + max(0, adjoint - 1) + has_drift
    branches = 1 if args.guidance_gradient == "distill" else branches_per_rank(args)
    grad_branches = grad_branches_per_rank(args)
    no_grad = levels + has_drift + kl_steps + (adjoint > 0)
    constant = (branches - grad_branches) * grad_steps + branches_per_rank(args) * no_grad
    prefix_steps = min(args.num_inference_steps - window, args.prefix_steps or args.num_inference_steps)
    prefix = 0 if is_offline(args) else branches * prefix_steps
    on_data = 1 / options.anchor_data_steps if options.anchor_data_steps else 0  # no second branch, as of the negative
    with_gradient = grad_branches * grad_steps + of_negative + on_data
    return CallCounts(prefix / args.rollout_reuse, constant + of_negative, with_gradient)


def _adjoint_steps(args: RewardGradientConfig) -> int:
    """Return the number of steps at which adjoint_matching trains; 0 for another method."""
    if args.method != "adjoint_matching":
        return 0
    return read_options(args.method, args.method_kwargs).adjoint_steps or args.num_inference_steps


def _stochastic_steps(args: RewardGradientConfig) -> tuple[int, int]:
    """Return the numbers of steps in flow_grpo's loss and in its KL; 0 for another method."""
    if args.method != "flow_grpo":
        return 0, 0
    steps = args.num_inference_steps - 1
    return steps, steps * bool(read_options(args.method, args.method_kwargs).kl_weight)


def plan_time(model: TracedModel, args: RewardGradientConfig, rewards: RewardNeeds, rates: Rates) -> dict[str, float]:
    """Return the seconds of an optimizer step, by phase."""
    batch, calls = args.per_device_train_batch_size * branches_per_batch(args), count_calls(args)
    branch = model.transformer_call(args, batch)
    decoder = model.decoder_call(args, args.per_device_train_batch_size, rewards.decoded_frames)
    # Copies run beside the computation: a pass takes the longer of the two.
    weights = _weight_copy_seconds(model, args, rates)
    copies = weights + _offloaded_bytes(model, args, batch) / rates.host_bandwidth
    no_grad = max(phase_seconds(branch.no_grad, rates), weights)
    forward = phase_seconds(branch.forward, rates) + (no_grad if args.stepwise_backward else 0)
    window = max(forward, copies) + max(phase_seconds(branch.backward, rates), copies)
    options = read_options(args.method, args.method_kwargs)
    draws = getattr(options, "num_draws", 0)
    videos = draws if args.method == "srpo" else 1 + draws
    seconds = _gradient_seconds
    if args.method in SCORES_ALONE:
        decoder = model.decoder_call(args, args.per_device_train_batch_size, rewards.decoded_frames, False)
        seconds = lambda call, rates: phase_seconds(call.no_grad, rates)
    scoring = rewards.seconds + sum(seconds(call, rates) for call in rewards.traced)
    phases = {
        "sampling": (calls.prefix + calls.constant) / branches_per_batch(args) * no_grad,
        "gradient window": calls.with_gradient / branches_per_batch(args) * window,
        "decode": videos * seconds(decoder, rates),
        "reward": videos * scoring * (2 if options.relative_words else 1) * (2 if options.reward_perturbation else 1),
    }
    repeats = args.gradient_accumulation_steps * (2 if options.weight_perturbation else 1)
    phases = {name: repeats * seconds for name, seconds in phases.items()}
    gradient_bytes = 2 * 4 * model.num_trained  # all-reduced in float32, in two passes of a ring
    sending = _share_of_others(gradient_bytes, model.processes) / rates.peer_bandwidth
    update = model.num_trained * ADAM_BYTES / rates.memory_bandwidth
    return phases | {"optimizer": sending + update}


def phase_seconds(phase: Phase, rates: Rates) -> float:
    """Return a phase's device time or launch time in seconds, whichever is longer."""
    on_device = sum(count * rates.operation_seconds(operation) for operation, count in phase.work.items())
    return max(on_device, phase.launches * rates.launch_seconds)


def _gradient_seconds(call: TracedCall, rates: Rates) -> float:
    """Return the seconds of a call's forward and backward pass."""
    return phase_seconds(call.forward, rates) + phase_seconds(call.backward, rates)


def _weight_copy_seconds(model: TracedModel, args: RewardGradientConfig, rates: Rates) -> float:
    """Return the seconds of bringing all blocks' weights to the device for one pass."""
    weight_bytes = model.frozen.blocks * model.itemsize
    if args.stream_weights:
        return weight_bytes / rates.host_bandwidth
    return _share_of_others(weight_bytes, model.processes) / rates.peer_bandwidth if args.shard_base else 0


def _share_of_others(size: float, processes: int) -> float:
    """Return the part of `size` that other processes hold, if all hold equal parts."""
    return size * (processes - 1) / processes


def _offloaded_bytes(model: TracedModel, args: RewardGradientConfig, batch: int) -> int:
    """Return the bytes that a forward pass copies to the host and the backward pass copies back."""
    if not args.offload_activations:
        return 0
    on_device = dataclasses.replace(args, offload_activations=False)
    return model.transformer_call(on_device, batch).saved_bytes - model.transformer_call(args, batch).saved_bytes
