"""What a run needs of its device - memory and seconds - and which settings need less, before any weight is loaded.

docs/planner.md says how the figures come about and how near they are to what was measured.
"""

import dataclasses
import itertools

from rlhf.checks import with_sampling
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.contentv.files import model_sizes
from rlhf.device import local_device, total_memory
from rlhf.encoders import encoder_configs, encoding_bytes
from rlhf.layout import planned_processes
from rlhf.measured import RATES
from rlhf.memory_plan import ENCODING, MemoryPlan, plan_memory, plan_rewards
from rlhf.parts import Parts
from rlhf.quantise import missing_library
from rlhf.rates import Rates, device_rates, known_rates
from rlhf.time_plan import TimePlan, count_calls, plan_time

GIB = 2**30
RECOMPUTED = {"gradient_checkpointing": True}
IN_PIECES = {"decode_chunk": 1, "decode_checkpoint": True}
# What lowers memory and leaves the gradient as it is: one of each row, beside the run's own settings.
EXACT = (
    (
        {},
        RECOMPUTED | {"keep_attention": True},
        RECOMPUTED,
        RECOMPUTED | {"keep_attention": True, "offload_activations": True},
        RECOMPUTED | {"offload_activations": True},
    ),
    ({}, {"stepwise_backward": True}),
    ({}, IN_PIECES, IN_PIECES | {"decode_caches": "host"}),
    ({}, RECOMPUTED | {"stream_weights": True}, {"shard_base": True}),
)
# And what changes it, in the order in which it is tried where nothing exact fits.
NOT_EXACT = (
    {"vae_dtype": "bfloat16"},
    {"vae_dtype": "bfloat16", "decode_window": 5},
    {"vae_dtype": "bfloat16", "decode_window": 5, "base_bits": 4},
)
OF_VIDEOS = "num_frames, height and width or per_device_train_batch_size"
SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run with some of its settings changed."""

    changes: dict
    memory: MemoryPlan
    time: TimePlan


class Planner:
    """Plans one process of a run. args has all sampling keys set; card: as of `rlhf.contentv.files.model_sizes`.

    encoders: configurations of the text encoders, as of `rlhf.encoders.encoder_configs`; without them, that encoding
    the prompts takes nothing.
    """

    def __init__(
        self,
        args: RewardGradientConfig,
        card: dict[str, dict],
        rates: Rates,
        encoders: dict[str, dict] | None = None,
        processes: int | None = None,
    ):
        self.args, self.rates = args, rates
        self.parts = Parts(args, card, planned_processes(args, processes))
        clip, t5 = card["tokenizer"]["model_max_length"], args.max_sequence_length
        tokens = {"text_encoder": clip, "text_encoder_2": clip, "text_encoder_3": t5}
        self.encoding = encoding_bytes(encoders or {}, tokens, self.parts.transformer.dtype)
        self.rewards = plan_rewards(self.parts, args)

    def plan(self, changes: dict | None = None) -> Plan:
        """The run with these settings changed: memory and seconds."""
        args = dataclasses.replace(self.args, **changes or {})
        rewards = plan_rewards(self.parts, args)
        memory = plan_memory(self.parts, args, rewards, self.encoding)
        return Plan(changes or {}, memory, plan_time(self.parts, args, rewards, self.rates))

    def memory(self, changes: dict) -> MemoryPlan:
        """Its memory alone, which is quicker."""
        args = dataclasses.replace(self.args, **changes)
        return plan_memory(self.parts, args, plan_rewards(self.parts, args), self.encoding)

    def fitting(self, limit: int) -> list[Plan]:
        """The changes after which the run needs at most `limit` bytes, fastest first; none that contains another.

        Exact ones; where there are none, those with the first of `NOT_EXACT` that helps. [] if nothing does.
        """
        for also in self._tried():
            fits = [changes for changes in self._changes(also) if self.memory(changes).most <= limit]
            found = [self.plan(changes) for changes in fits]
            found.sort(key=lambda plan: (plan.time.total, len(plan.changes)))
            if found:
                return [p for i, p in enumerate(found) if not any(_within(q, p) for q in found[:i])]
        return []

    def least(self) -> MemoryPlan:
        """The memory with the settings that need least of it."""
        changes = itertools.chain.from_iterable(map(self._changes, self._tried()))
        return min(map(self.memory, changes), key=lambda plan: plan.most)

    def _tried(self) -> list[dict]:
        """What changes the gradient, beginning with nothing; a window of all frames is none."""
        frames = self.args.num_frames
        fitting = [{k: v for k, v in row.items() if k != "decode_window" or v < frames} for row in NOT_EXACT]
        return [{}, *filter(self._possible, fitting)]

    def _changes(self, also: dict) -> list[dict]:
        """Every combination that makes sense: what the settings have already is no change."""
        own, seen = vars(self.args), []
        for rows in itertools.product(*EXACT):
            wanted = {name: value for row in (*rows, also) for name, value in row.items()}
            changes = {name: value for name, value in wanted.items() if own[name] != value}
            if changes not in seen and self._makes_sense(own | changes):
                seen.append(changes)
        return seen

    def _makes_sense(self, settings: dict) -> bool:
        """Of what is done about the weights, one thing at a time; sharding needs several processes."""
        weights = settings["base_bits"] or settings["sampling_weights"] != "own"
        alone = settings["shard_base"] and self.parts.processes == 1
        return not alone and bool(weights) + settings["stream_weights"] + settings["shard_base"] <= 1

    def _possible(self, changes: dict) -> bool:
        """Whether the run could make them, and has not done so already."""
        bits = changes.get("base_bits")
        if bits and (missing_library() or not self._makes_sense(vars(self.args) | changes)):
            return False
        return any(getattr(self.args, name) != value for name, value in changes.items())


def _within(fewer: Plan, more: Plan) -> bool:
    """Whether one's changes are all among the other's."""
    return fewer.changes.items() <= more.changes.items()


# ------------------------------------------------------------------------------------------------- in words


def describe(
    args: RewardGradientConfig,
    memory_limit_gib: float | None = None,
    device_name: str | None = None,
    processes: int | None = None,
) -> str:
    """Return the resolved settings as YAML, then what the run needs, each figure with its source.

    memory_limit_gib: to plan for. Default: what the device has. device_name: of a measured device.
    Default: this machine's. processes: of the run. Default: those started. Raises ConfigError.
    """
    card = model_sizes(args.model)
    args = with_sampling(args, card["sampling"])
    rates, source, memory = planned_device(args, memory_limit_gib, device_name)
    planner = Planner(args, card, rates, encoder_configs(args.model), processes)
    plan = planner.plan()
    texts = [args.to_yaml(), sizes(planner), needs(planner, plan, source)]
    if memory is not None:
        texts.append(verdict(planner, plan, memory))
    return "\n".join(texts)


def planned_device(
    args: RewardGradientConfig, memory_limit_gib: float | None, device_name: str | None
) -> tuple[Rates, str, int | None]:
    """Rates, where they are from, and the bytes that the device has, None where that is not known."""
    asked = memory_limit_gib and int(memory_limit_gib * GIB)
    if device_name:
        if (rates := known_rates(device_name)) is None:
            got = f"plan_device: got {device_name!r}, expected one of those measured ({', '.join(RATES)})"
            raise ConfigError([f"{got}; choose one, or leave it out for this machine's"])
        return rates, "measured by bench/planner.py", asked
    device = local_device(args.device)
    return *device_rates(device), asked or total_memory(device)


def sizes(planner: Planner) -> str:
    """Processes, latents, tokens, parameters, calls."""
    parts, args, calls = planner.parts, planner.args, count_calls(planner.args)
    videos = parts.sizes.data * args.per_device_train_batch_size * args.gradient_accumulation_steps
    frozen, vae = sum(parts.frozen) - parts.frozen[1], sum(p.numel() for p in parts.vae.parameters())
    forwards = calls.prefix + calls.constant + calls.with_gradient
    rows = [
        ("processes, one a device", f"{parts.processes} ({parts.sizes})" if parts.processes > 1 else "1"),
        ("videos of an optimizer step, of all", f"{videos}"),
        ("latents (channels, frames, height, width)", f"{parts.latents}"),
        ("video tokens", f"{parts.tokens:,}"),
        ("transformer", f"{frozen:,} parameters, {_size(frozen * parts.transformer.dtype.itemsize)}"),
        ("VAE", f"{vae:,} parameters"),
        ("trained", f"{parts.trained:,} parameters"),
        ("frames that are decoded", f"{planner.rewards.frames}"),
        ("transformer forwards of a process, a step and video", f"{forwards:g}"),
        ("of these with gradient, at most", f"{calls.with_gradient:g}"),
    ]
    return _table("Sizes:", rows)


def needs(planner: Planner, plan: Plan, source: str) -> str:
    """Memory and time, by what is held and by phase."""
    rates, left_out = planner.rates, ", ".join(planner.rewards.unknown)
    memory = [(name, _size(size)) for name, size in plan.memory.held.items()]
    phases = [(f"and in {name}", _size(size)) for name, size in plan.memory.phases.items() if size]
    most = [("at most", _size(plan.memory.most)), ("beside it, context and kernels", _size(rates.beside))]
    seconds = [(name, _seconds(value)) for name, value in plan.time.parts.items()]
    titles = [
        "Memory of one device, predicted, not measured (docs/planner.md)."
        + (f" Not known, and left out: {left_out}." if left_out else ""),
        f"Time of an optimizer step, predicted from the rates of {rates.device} ({source}):",
    ]
    total = [("in all", _seconds(plan.time.total)), ("all steps", _seconds(plan.time.total * planner.args.max_steps))]
    return _table(titles[0], memory + phases + most) + "\n" + _table(titles[1], seconds + total)


def verdict(planner: Planner, plan: Plan, memory: int) -> str:
    """Whether it fits; if not, what would."""
    limit = memory - planner.rates.beside
    if plan.memory.most <= limit:
        return f"It fits into {_size(memory)}."
    more, phase = _size(plan.memory.most - limit), plan.memory.worst
    missing = f"It does not fit into {_size(memory)}: {more} are missing ({phase})."
    plans = planner.fitting(limit)
    if not plans:
        least = planner.least()
        lower = "Take" if least.worst == ENCODING else f"Lower {OF_VIDEOS}, take"
        return (
            f"{missing} None of the settings about memory is enough: with all of them {_size(least.most)} are needed "
            f"({least.worst}). {lower} rewards of fewer weights, or a device with more memory."
        )
    inexact = {name for changes in NOT_EXACT for name in changes} & {name for p in plans for name in p.changes}
    same = "at the same gradient" if not inexact else f"not at the same gradient ({', '.join(sorted(inexact))})"
    lines = [
        f"  {_settings(p.changes)}: {_size(p.memory.most)}, {_seconds(p.time.total)} a step" for p in plans[:SHOWN]
    ]
    return "\n".join([f"{missing} Settings that fit, {same}, fastest first:", *lines])


def _settings(changes: dict) -> str:
    return " ".join(
        f"--{name} {str(value).lower() if isinstance(value, bool) else value}" for name, value in changes.items()
    )


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
