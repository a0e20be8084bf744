"""The text that `--dry_run` prints: settings, sizes, memory, time, and settings that fit."""

from rlhf.config import ConfigError, RewardGradientConfig, with_sampling
from rlhf.contentv.files import model_sizes
from rlhf.device import describe, local_device, non_pytorch_memory, total_memory
from rlhf.distributed.layout import Sizes, planned_processes
from rlhf.planner.memory import ENCODING
from rlhf.planner.search import INEXACT_CHOICES, Estimate, Planner
from rlhf.planner.text_encoders import encoder_configs
from rlhf.planner.time import ACCURACY, H200, RATES, count_calls

GIB = 2**30
NUM_SHOWN = 5  # settings that fit


def plan_report(
    args: RewardGradientConfig,
    memory_limit_gib: float | None = None,
    device_name: str | None = None,
    processes: int | None = None,
) -> str:
    """Return the resolved settings as YAML, then the memory and the time that they need.

    Args:
        args: checked settings.
        memory_limit_gib: memory of the device to plan for. None: what this machine's device has.
        device_name: a key of `RATES`, whose rates give the time. None: this machine's device.
        processes: ranks to plan for, one a device. None: those that were started.

    Raises ConfigError for a flag that cannot be planned for.
    """
    if memory_limit_gib is not None and not memory_limit_gib > 0:
        raise ConfigError([f"memory_limit_gib: got {memory_limit_gib}, expected more than 0; raise it"])
    if processes is not None and processes < 1:
        raise ConfigError([f"plan_processes: got {processes}, expected at least 1; raise it"])
    if device_name is not None and device_name not in RATES:
        expected = f"expected one whose rates are known ({', '.join(RATES)})"
        raise ConfigError([f"plan_device: got {device_name!r}, {expected}; choose one, or leave it out"])
    processes = planned_processes(args, processes)
    try:
        Sizes.of(args, processes)
    except ValueError as error:
        raise ConfigError([str(error)]) from None

    card = model_sizes(args.model)
    args = with_sampling(args, card["sampling"])
    limit = int(memory_limit_gib * GIB) if memory_limit_gib else None
    if device_name is None:
        device = local_device(args.device)
        device_name, limit = describe(device), limit or total_memory(device)
    rates = RATES.get(device_name, H200)
    context_bytes = rates.context_bytes if device_name in RATES else non_pytorch_memory(device)
    planner = Planner(args, card, rates, encoder_configs(args.model), processes)
    estimate = planner.estimate()
    texts = [args.to_yaml(), format_sizes(planner)]
    texts += [format_memory(planner, estimate, context_bytes)]
    texts += [format_time(planner, estimate, device_name)]
    if limit is not None:
        texts.append(format_fit(planner, estimate, limit, context_bytes, device_name))
    return "\n".join(texts)


def format_sizes(planner: Planner) -> str:
    """Return the table of ranks, latents, tokens, parameters and transformer calls."""
    model, args, calls = planner.model, planner.args, count_calls(planner.args)
    videos = model.layout.data * args.per_device_train_batch_size * args.gradient_accumulation_steps
    frozen = model.frozen.blocks + model.frozen.rest
    weights = _size(frozen * model.transformer.dtype.itemsize)
    vae = sum(p.numel() for p in model.vae.parameters())
    forwards = calls.prefix + calls.constant + calls.with_gradient
    layout = f" ({model.layout})" if model.processes > 1 else ""
    rows = [
        ("processes, one a device", f"{model.processes}{layout}"),
        ("videos of an optimizer step, all processes", f"{videos}"),
        ("latents (channels, frames, height, width)", f"{model.latent_shape}"),
        ("video tokens", f"{model.num_tokens:,}"),
        ("transformer", f"{frozen:,} parameters, {weights}"),
        ("VAE", f"{vae:,} parameters"),
        ("trained", f"{model.num_trained:,} parameters"),
        ("decoded frames", f"{planner.rewards.decoded_frames}"),
        ("transformer calls of one process, per video", f"{forwards:g}"),
        ("of these with gradient, at most", f"{calls.with_gradient:g}"),
    ]
    return _table("Sizes:", rows)


def format_memory(planner: Planner, estimate: Estimate, context_bytes: int) -> str:
    """Return the table of memory. A row with + is the peak of a phase above what is held."""
    memory, unknown = estimate.memory, ", ".join(planner.rewards.unknown)
    rows = [(name, _size(size)) for name, size in memory.held.items()]
    rows += [(f"+ peak of {name}", _size(size)) for name, size in memory.phases.items() if size]
    rows += [("peak", _size(memory.peak_bytes))]
    rows += [("outside of PyTorch: context, kernels", _size(context_bytes))]
    left_out = f" Left out, since not known: {unknown}." if unknown else ""
    return _table(f"Memory of one device, estimated (docs/planner.md).{left_out}", rows)


def format_time(planner: Planner, estimate: Estimate, device_name: str) -> str:
    """Return the table of seconds by phase, or a line that says why there is none."""
    if device_name not in RATES:
        known = " or ".join(RATES)
        return f"Time of a step: not estimated for {device_name}; --plan_device takes {known}."
    rows = [(name, _seconds(value)) for name, value in estimate.time.phases.items()]
    total = estimate.time.total
    rows += [("one step", _seconds(total)), ("all steps", _seconds(total * planner.args.max_steps))]
    title = f"Time of an optimizer step on {device_name}: about, within {ACCURACY:.0%}."
    return _table(title, rows)


def format_fit(planner: Planner, estimate: Estimate, memory: int, context_bytes: int, device_name: str) -> str:
    """Return whether the run fits into `memory` bytes; if not, settings with which it does."""
    limit = memory - context_bytes
    if estimate.memory.peak_bytes <= limit:
        return f"It fits into {_size(memory)}."
    missing, phase = _size(estimate.memory.peak_bytes - limit), estimate.memory.peak_phase
    verdict = f"It does not fit into {_size(memory)}: {missing} are missing ({phase})."
    fitting = planner.find_fitting(limit)
    if not fitting:
        least = planner.smallest_memory()
        lower = "lower num_frames, height and width or the batch size, "
        return (
            f"{verdict} No memory setting is enough: with all of them, "
            f"{_size(least.peak_bytes)} are needed ({least.peak_phase}). "
            f"To fit, {'' if least.peak_phase == ENCODING else lower}"
            "use rewards with fewer weights, or a device with more memory."
        )
    changed = {name for estimate in fitting for name in estimate.changes}
    inexact = sorted(changed & {name for choice in INEXACT_CHOICES for name in choice})
    gradient = f"with another gradient ({', '.join(inexact)})" if inexact else "with the same gradient"
    order = "fastest first" + ("" if device_name in RATES else ", as on an NVIDIA H200")
    lines = [f"{verdict} Settings that fit, {gradient}, {order}:"]
    for found in fitting[:NUM_SHOWN]:
        pace = f", {_seconds(found.time.total)} a step" if device_name in RATES else ""
        lines.append(f"  {_flags(found.changes)}: {_size(found.memory.peak_bytes)}{pace}")
    return "\n".join(lines)


def _flags(changes: dict) -> str:
    return " ".join(f"--{name} {str(value).lower()}" for name, value in changes.items())


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in rows)])


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _seconds(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"
