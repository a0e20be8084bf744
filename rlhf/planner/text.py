"""The text that `--dry_run` prints: settings, sizes, memory, time, and settings that fit."""

import os

from rewards.cli.table import format_table
from rlhf.config import ConfigError, RewardGradientConfig, with_sampling
from rlhf.device import RATED_KIND, describe, host_memory, local_device, non_pytorch_memory, total_memory
from rlhf.distributed.layout import Sizes, planned_processes
from rlhf.generator.files import model_sizes
from rlhf.method.options import WITH_GRADIENT, WITHOUT_GRADIENT
from rlhf.planner.host import HOST_ACCURACY, HostPlan
from rlhf.planner.memory import ENCODING, EVALUATION
from rlhf.planner.search import INEXACT_CHOICES, Estimate, Planner
from rlhf.planner.text_encoders import encoder_configs
from rlhf.planner.time import ACCURACY, H200, RATES, count_calls

GIB = 2**30
NUM_SHOWN = 5  # settings that fit
ON_A_CPU = "A process on a CPU needs more: its libraries, and freed memory that it keeps. Neither is estimated."
SOME_ACCELERATOR = "an accelerator"
ABSENT = (
    f"Planned for {SOME_ACCELERATOR} of the memory given, for this machine has none. --device cpu plans for its CPU."
)


def plan_report(
    args: RewardGradientConfig,
    memory_limit_gib: float | None = None,
    device_name: str | None = None,
    processes: int | None = None,
) -> str:
    """Return the resolved settings as YAML, then the memory and the time that they need.

    Args:
        args: checked settings.
        memory_limit_gib: memory of the device to plan for; see `plans_accelerator`. None: what
            this machine's device has.
        device_name: a key of `RATES`, whose rates give the time. None: this machine's device.
        processes: ranks to plan for, one a device. None: as many as were launched.

    Raises ConfigError for a flag that cannot be planned for.
    """
    if memory_limit_gib is not None and not memory_limit_gib > 0:
        raise ConfigError([f"memory_limit_gib: got {memory_limit_gib}, expected more than 0; raise it"])
    if processes is not None and processes < 1:
        raise ConfigError([f"plan_processes: got {processes}, expected at least 1; raise it"])
    if device_name is not None and device_name not in RATES:
        expected = f"expected one whose rates are known ({', '.join(RATES)})"
        raise ConfigError([f"plan_device: got {device_name!r}, {expected}; choose one, or leave it out"])
    if args.method == "auto":
        expected = f"expected what it becomes: {WITH_GRADIENT}, or {WITHOUT_GRADIENT} if a reward has no gradient"
        raise ConfigError([f"method: got auto in a dry run, which loads no reward, {expected}; name one"])
    processes = planned_processes(args, processes)
    try:
        Sizes.from_settings(args, processes)
    except ValueError as error:
        raise ConfigError([str(error)]) from None

    card = model_sizes(args.model)
    args = with_sampling(args, card["sampling"])
    limit = int(memory_limit_gib * GIB) if memory_limit_gib else None
    device = None if device_name else local_device(args.device)
    absent = device is not None and device.type == "cpu" and plans_accelerator(args, memory_limit_gib, device_name)
    if absent:
        device, device_name = None, SOME_ACCELERATOR
    kind, elsewhere = RATED_KIND, device is None
    if device is not None:
        device_name, limit, kind = describe(device), limit or total_memory(device), device.type
    rates = RATES.get(device_name, H200)
    context_bytes = rates.context_bytes if elsewhere or device_name in RATES else non_pytorch_memory(device)
    planner = Planner(args, card, rates, encoder_configs(args.model), processes, kind)
    estimate = planner.estimate()
    texts = [args.to_yaml(), format_sizes(planner), format_memory(planner, estimate, context_bytes)]
    texts += [ON_A_CPU] * (kind == "cpu") + [ABSENT] * absent
    texts.append(format_host(estimate.host, processes, None if elsewhere else host_memory()))
    texts.append(format_time(planner, estimate, device_name))
    if limit is not None:
        texts.append(format_fit(planner, estimate, limit, context_bytes, device_name))
    return "\n\n".join(text.rstrip() for text in texts)


def plans_accelerator(args: RewardGradientConfig, memory_limit_gib: float | None, device_name: str | None) -> bool:
    """Return whether the flags ask for an accelerator, even if this machine has none."""
    return bool(device_name or (memory_limit_gib and args.device != "cpu"))


def format_sizes(planner: Planner) -> str:
    """Return the table of ranks, latents, tokens, parameters and transformer calls."""
    model, args, calls = planner.model, planner.args, count_calls(planner.args)
    videos = model.layout.data * args.per_device_train_batch_size * args.gradient_accumulation_steps
    frozen = model.frozen.blocks + model.frozen.rest
    weights = _format_bytes(frozen * model.itemsize)
    forwards = calls.prefix + calls.constant + calls.with_gradient
    layout = f" ({model.layout})" if model.processes > 1 else ""
    rows = [
        ("Sizes", ""),
        ("processes, one a device", f"{model.processes}{layout}"),
        ("videos of an optimizer step, all processes", f"{videos}"),
        ("latents (channels, frames, height, width)", f"{model.latent_shape}"),
        ("video tokens", f"{model.num_tokens:,}"),
        ("transformer", f"{frozen:,} parameters, {weights}"),
        ("VAE", f"{model.vae.num_parameters():,} parameters"),
        ("trained", f"{model.num_trained:,} parameters"),
        ("decoded frames", f"{planner.rewards.decoded_frames}"),
        ("transformer calls of one process, per video", f"{forwards:g}"),
        ("of these with gradient, at most", f"{calls.with_gradient:g}"),
    ]
    return format_table(rows)


def format_memory(planner: Planner, estimate: Estimate, context_bytes: int) -> str:
    """Return two tables: the memory that is always in use, and the peak of each phase with it."""
    memory, unknown = estimate.memory, ", ".join(planner.rewards.unknown)
    always = memory.held_bytes + context_bytes
    held = memory.held | {"context and kernels, outside of PyTorch": context_bytes, "together": always}
    phases = {name + " (the highest)" * (name == memory.peak_phase): size for name, size in memory.phases.items()}
    in_use = [(name, _format_bytes(size)) for name, size in held.items()]
    peaks = [(name, _format_bytes(always + size)) for name, size in phases.items() if size]
    left_out = f"\nLeft out, as its cost is not known: {unknown}" if unknown else ""
    return "\n\n".join(
        (
            format_table([("Always in use on one device, estimated", ""), *in_use], numbers=True),
            format_table([("Peak memory of each phase, with that", ""), *peaks], numbers=True) + left_out,
        )
    )


def format_host(host: HostPlan, processes: int, available: int | None) -> str:
    """Return a line about host memory.

    available: the host memory of this machine. None if the plan is for another machine.
    """
    each = " for each process" if processes > 1 else ""
    line = (
        f"Host memory: {_format_bytes(host.peak_bytes)}{each}, within {HOST_ACCURACY:.0%}, most for {host.peak_phase}."
    )
    if available is None:
        return line
    local = min(processes, int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
    if host.peak_bytes * local <= available:
        return f"{line} This machine has {_format_bytes(available)}."
    cure = "stream_weights, offload_activations and decode_caches host take it; lower num_frames, or use a larger host"
    return f"{line} It does not fit: this machine has {_format_bytes(available)}. {cure[0].upper()}{cure[1:]}."


def format_time(planner: Planner, estimate: Estimate, device_name: str) -> str:
    """Return the table of seconds by phase, or a line that says why there is none."""
    if device_name not in RATES:
        known = " or ".join(f'"{name}"' for name in RATES)
        return f"Time of a step: not estimated for {device_name}; --plan_device takes {known}."
    total = estimate.step_seconds
    rows = [
        (f"Time on {device_name}, within {ACCURACY:.0%}", ""),
        *((name, _format_seconds(value)) for name, value in estimate.time.items()),
        ("one optimizer step", _format_seconds(total)),
        (f"all {planner.args.max_steps:,} steps", _format_seconds(total * planner.args.max_steps)),
    ]
    return format_table(rows, numbers=True)


def format_fit(planner: Planner, estimate: Estimate, memory: int, context_bytes: int, device_name: str) -> str:
    """Return the verdict whether the run fits into `memory` bytes, and settings that would fit."""
    limit = memory - context_bytes
    if estimate.memory.peak_bytes <= limit:
        return f"It fits into {_format_bytes(memory)}."
    missing, phase = _format_bytes(estimate.memory.peak_bytes - limit), estimate.memory.peak_phase
    verdict = f"It does not fit into {_format_bytes(memory)}: {missing} more are needed for {phase}."
    fitting = planner.find_fitting(limit)
    if not fitting:
        least = planner.smallest_memory()
        batch = f"per_device_{'eval' if least.peak_phase == EVALUATION else 'train'}_batch_size"
        lower = f"lower {f'{batch}, ' * (getattr(planner.args, batch) > 1)}num_frames, or height and width; "
        lower *= least.peak_phase != ENCODING
        return (
            f"{verdict} No memory setting is enough: with all of them, "
            f"{_format_bytes(least.peak_bytes + context_bytes)} are needed for {least.peak_phase}. "
            f"To fit, {lower}use rewards with fewer weights, or a device with more memory."
        )
    changed = {name for estimate in fitting for name in estimate.changes}
    inexact = sorted(changed & {name for choice in INEXACT_CHOICES for name in choice})
    gradient = f"with another gradient ({', '.join(inexact)})" if inexact else "with the same gradient"
    is_known = device_name in RATES
    order = "fastest first" if is_known else "fastest first, as on an NVIDIA H200"
    rows = [("memory", "one step" if is_known else "", "add to the command")]
    for found in fitting[:NUM_SHOWN]:
        needed = _format_bytes(found.memory.peak_bytes + context_bytes)
        flags = " ".join(f"--{name} {str(value).lower()}" for name, value in found.changes.items())
        rows.append((needed, _format_seconds(found.step_seconds) if is_known else "", flags))
    return f"{verdict}\nSettings that fit, {gradient}, {order}:\n\n{format_table(rows)}"


def _format_bytes(size: float) -> str:
    """Return bytes in GiB or MiB."""
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _format_seconds(seconds: float) -> str:
    """Return a duration in hours, minutes, seconds or milliseconds."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"
