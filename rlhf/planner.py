"""What a run needs of its device - memory and seconds - and which settings need less, before anything is loaded."""

import dataclasses
import itertools

import torch

from rlhf.checks import model_card, with_sampling
from rlhf.config import RewardGradientConfig
from rlhf.device import local_device
from rlhf.memory_plan import GIB, MemoryPlan, Rewards, plan_memory, plan_rewards
from rlhf.parts import Parts
from rlhf.rates import Rates, device_rates, known_rates
from rlhf.time_plan import TimePlan, count_calls, plan_time

# What lowers memory at the same gradient: settings, beside those of the run.
OF_BLOCKS = [
    {},
    {"gradient_checkpointing": True, "keep_attention": True},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "keep_attention": True, "offload_activations": True},
    {"gradient_checkpointing": True, "offload_activations": True},
]
OF_WEIGHTS = [{}, {"gradient_checkpointing": True, "stream_weights": True}]
OF_WINDOW = [{}, {"stepwise_backward": True}]
PIECES = {"decode_chunk": 1, "decode_checkpoint": True}
OF_DECODER = [{}, PIECES, PIECES | {"decode_caches": "host"}]
# And what changes it.
NOT_EXACT = [{"vae_dtype": "bfloat16"}, {"guidance_gradient": "text"}, {"base_bits": 8}, {"base_bits": 4}]
SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run as it would be with some settings changed."""

    changes: dict
    memory: MemoryPlan
    time: TimePlan


class Planner:
    """Of one run. limit: bytes of the device that tensors may take, None for no limit."""

    def __init__(self, args: RewardGradientConfig, card: dict[str, dict], rates: Rates, limit: int | None = None):
        self.args, self.rates, self.limit = args, rates, limit
        self.parts = Parts(args, card)

    def plan(self, changes: dict | None = None) -> Plan:
        args = dataclasses.replace(self.args, **changes or {})
        rewards: Rewards = plan_rewards(self.parts)
        memory = plan_memory(self.parts, args, rewards)
        return Plan(changes or {}, memory, plan_time(self.parts, args, rewards, self.rates))

    def fits(self, plan: Plan) -> bool:
        return self.limit is None or plan.memory.most <= self.limit
