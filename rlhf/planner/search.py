"""Search for the settings with which a run fits a device, before any weight is loaded.

docs/planner.md explains the estimates and states their accuracy.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from rlhf.config import RewardGradientConfig
from rlhf.device import RATED_KIND
from rlhf.execution.quantize import missing_library
from rlhf.generator.registry import family_of_config
from rlhf.planner.host import HostPlan, plan_host
from rlhf.planner.memory import MemoryPlan, plan_memory, plan_rewards
from rlhf.planner.text_encoders import encoding_bytes
from rlhf.planner.time import H200, Rates, plan_time
from rlhf.planner.traced import TracedModel

CHECKPOINTING = {"gradient_checkpointing": True}
CHUNKED_DECODE = {"decode_chunk": 1, "decode_checkpoint": True}
# Settings that lower memory and leave the gradient as it is: one choice of each row, on top of the
# run's settings.
EXACT_CHOICES = (
    (
        {},
        CHECKPOINTING | {"keep_attention": True},
        CHECKPOINTING,
        CHECKPOINTING | {"keep_attention": True, "offload_activations": True},
        CHECKPOINTING | {"offload_activations": True},
    ),
    ({}, {"stepwise_backward": True}),
    ({}, CHUNKED_DECODE, CHUNKED_DECODE | {"decode_caches": "host"}),
    ({}, CHECKPOINTING | {"stream_weights": True}, {"shard_base": True}),
)
# Settings that change the gradient, tried in this order if no exact choice fits.
INEXACT_CHOICES = (
    {"vae_dtype": "bfloat16"},
    {"vae_dtype": "bfloat16", "decode_window": 5},
    {"vae_dtype": "bfloat16", "decode_window": 5, "base_bits": 4},
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Memory and time of a run with changed settings, for the device and the host."""

    changes: dict
    memory: MemoryPlan
    host: HostPlan
    time: dict[str, float]  # seconds of one optimizer step, by phase

    @property
    def step_seconds(self) -> float:
        """Seconds of one optimizer step."""
        return sum(self.time.values())

    def extends(self, other: "Estimate") -> bool:
        """Return whether this estimate has all changes of the other."""
        return other.changes.items() <= self.changes.items()


class Planner:
    """Estimates of memory and time for one of the `processes` ranks of a run.

    args: the run's settings, with all sampling keys set. card: as `model_sizes` returns it.
    encoders: as `encoder_configs` returns them; without them, encoding the prompts takes no memory.
    kind: the kind of the devices, one of `KNOWN_DEVICES`.
    """

    def __init__(
        self,
        args: RewardGradientConfig,
        card: dict[str, dict],
        rates: Rates = H200,
        encoders: dict[str, dict] | None = None,
        processes: int = 1,
        kind: str = RATED_KIND,
    ):
        self.kind = kind
        self.args, self.rates, self.model = args, rates, TracedModel(args, card, processes)
        family = family_of_config(card["transformer"])
        tokens = family.encoder_tokens(card, args.max_sequence_length)
        classes, dtype = family.classes.text_encoders, self.model.transformer.dtype
        each = [{name: config} for name, config in (encoders or {}).items()]
        largest = lambda **batch: max((encoding_bytes(classes, one, tokens, dtype, **batch) for one in each), default=0)
        self.encoder_bytes, self.encoder_weights = largest(), largest(batch=0)
        self.rewards = plan_rewards(self.model, args, kind)

    def estimate(self, changes: dict | None = None) -> Estimate:
        """Return the memory and the time after these changes."""
        args = dataclasses.replace(self.args, **changes or {})
        rewards = plan_rewards(self.model, args, self.kind)
        memory = plan_memory(self.model, args, rewards, self.encoder_bytes)
        host = plan_host(self.model, args, rewards, memory, self.encoder_weights, self.kind)
        return Estimate(changes or {}, memory, host, plan_time(self.model, args, rewards, self.rates))

    def find_fitting(self, limit: int) -> list[Estimate]:
        """Return estimates that need at most `limit` bytes, the fastest first. [] if there is none.

        If no choice that keeps the gradient exact fits, `INEXACT_CHOICES` are tried in order. An
        estimate is left out if it only adds changes to a faster one.
        """
        for inexact in self._inexact_choices():
            estimates = map(self.estimate, self._combinations(inexact))
            found = [estimate for estimate in estimates if estimate.memory.peak_bytes <= limit]
            found.sort(key=lambda estimate: (estimate.step_seconds, len(estimate.changes)))
            if found:
                return [e for i, e in enumerate(found) if not any(map(e.extends, found[:i]))]
        return []

    def smallest_memory(self) -> MemoryPlan:
        """Return the memory plan of the settings that need the least memory."""
        changes = (c for inexact in self._inexact_choices() for c in self._combinations(inexact))
        return min((self.estimate(c).memory for c in changes), key=lambda memory: memory.peak_bytes)

    def _inexact_choices(self) -> Iterator[dict]:
        """Yield {}, then each possible inexact choice that is not set already."""
        yield {}
        for choice in INEXACT_CHOICES:
            if choice.get("decode_window", 0) >= self.args.num_frames:  # all frames
                choice = {name: value for name, value in choice.items() if name != "decode_window"}
            settings, bits = vars(self.args) | choice, choice.get("base_bits")
            is_possible = not bits or (_is_valid(settings, self.model) and not missing_library())
            if is_possible and settings != vars(self.args):
                yield choice

    def _combinations(self, inexact: dict) -> list[dict]:
        """Return the changes of each valid combination of exact choices.

        inexact: changes that every combination adds.
        """
        own, found = vars(self.args), []
        for choices in itertools.product(*EXACT_CHOICES):
            wanted = {name: value for choice in (*choices, inexact) for name, value in choice.items()}
            changes = {name: value for name, value in wanted.items() if own[name] != value}
            if changes not in found and _is_valid(own | changes, self.model):
                found.append(changes)
        return found


def _is_valid(settings: dict, model: TracedModel) -> bool:
    """Return whether at most one of base_bits, stream_weights and shard_base is set.

    shard_base also needs several processes.
    """
    about_weights = bool(settings["base_bits"]) + settings["stream_weights"] + settings["shard_base"]
    return about_weights <= 1 and not (settings["shard_base"] and model.processes == 1)
