"""The memory of a process of a run on its device, phase by phase: its parts, put together as the trainer does.

All of it is worked out on tensors without storage (`rlhf.parts`), but the rewards, which were measured
(`rewards.costs`). It is what PyTorch reports as allocated at most; a process takes more of a device than that: the
vendor's context and kernels (`Rates.beside`), and blocks that PyTorch's allocator keeps without using them.
"""

from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from rewards.catalogue import CATALOGUE
from rewards.costs import cost, decoded_frames, scored_frames
from rlhf.config import RewardGradientConfig
from rlhf.optimizer import MOMENT_BYTES
from rlhf.parts import Part, Parts, window_steps

ENCODING = "encoding prompts"
MASTER_BYTES = 8  # of a trained number: master and gradient, in float32


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device."""

    held: dict[str, int]  # all the time
    phases: dict[str, int]  # besides, at most

    @property
    def resident(self) -> int:
        """All that is held."""
        return sum(self.held.values())

    @property
    def most(self) -> int:
        """Held at the worst moment."""
        return self.resident + self.phases[self.worst]

    @property
    def worst(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=self.phases.get)


@dataclass(frozen=True)
class Rewards:
    """What the rewards that are trained on need. frames: leading ones that are decoded."""

    frames: int
    weights: int
    memory: int  # of the one that takes most
    seconds: float  # of all, on `rewards.measured.DEVICE`
    traced: tuple[Part, ...] = ()  # of those that are small enough to be traced instead
    unknown: tuple[str, ...] = ()  # whose cost is not in these figures


def plan_rewards(parts: Parts, args: RewardGradientConfig) -> Rewards:
    """What args.reward_funcs need for one batch; weights are counted of args.eval_reward_funcs, too."""
    fps = parts.card["sampling"]["fps"]
    batch, kwargs = args.per_device_train_batch_size, args.reward_kwargs or {}
    known = {name: kwargs.get(name, {}) for name in args.reward_funcs if name in CATALOGUE}
    total, unknown = args.num_frames, [name for name in args.reward_funcs if name not in CATALOGUE]
    decoded = {name: decoded_frames(name, settings, total) for name, settings in known.items()}
    frames = total if unknown else max(decoded.values())
    costs, traced = {}, []
    for name, settings in known.items():
        scored = scored_frames(name, settings, min(decoded[name], args.decode_window or frames), fps)
        if found := cost(name, settings, batch * scored):
            costs[name] = found
        elif name == "nano_preference":
            traced.append(parts.nano_preference(batch, min(frames, args.decode_window or frames)))
        else:
            unknown.append(name)
    judges = [name for name in args.eval_reward_funcs if name in CATALOGUE]
    weights = sum(c.weights for c in costs.values()) + sum(_weights(n) for n in [*known, *judges] if n not in costs)
    memory = max((*(c.memory for c in costs.values()), *(most_of(p) for p in traced), 0))
    seconds = sum(c.seconds for c in costs.values())
    return Rewards(frames, weights, memory, seconds, tuple(traced), tuple(unknown))


def _weights(name: str) -> int:
    return CATALOGUE[name].parameters * CATALOGUE[name].bytes_each


def most_of(part: Part) -> int:
    """Bytes held at most in the forward pass with gradient or in the backward pass."""
    return max(part.forward.most, part.backward.most) - part.forward.start


def plan_memory(parts: Parts, args: RewardGradientConfig, rewards: Rewards, encoders: int = 0) -> MemoryPlan:
    """What a run holds on one device, and what each of its phases takes besides.

    args: as those of parts, but for settings about speed and memory; rewards: `plan_rewards` of the same.
    encoders: bytes that encoding the prompts takes, before the first step.
    """
    batch = args.per_device_train_batch_size
    branch = parts.branch(args, batch * together(args))
    decoder = parts.decoder(args, batch, rewards.frames)
    graphs = _graphs(args)
    others = 0 if args.stepwise_backward else (graphs - 1) * branch.kept
    waiting = 0 if args.stepwise_backward else graphs * branch.kept
    before = parts.adapter_bytes if graphs > 1 else 0  # gradients of the graphs that were first
    video = batch * 3 * rewards.frames * args.height * args.width * 4  # it was scored, and is still there
    held, whole = _held(parts, args, rewards), gathered_bytes(parts, args)
    # Before the first step there are no moments yet, and no position table.
    later = MOMENT_BYTES * parts.trained + held["position table"]
    phases = {
        ENCODING: max(0, encoders - later),
        "sampling": whole + branch.sampling.most - branch.sampling.start,
        "gradient segment": whole + others + before + most_of(branch) + video,
        "decoding and back": waiting + most_of(decoder),
        "reward and back": waiting + decoder.kept + rewards.memory,
        "optimizer": 4 * parts.trained if parts.processes > 1 else 0,  # the sum over processes is a tensor of its own
    }
    if args.eval_prompts:
        phases["evaluation"] = whole + _evaluation(parts, args)
    return MemoryPlan(held, phases)


def together(args: RewardGradientConfig) -> int:
    """Branches of guidance that are run as one batch."""
    return 2 if args.guidance_together and args.guidance_scale > 1 else 1


def run_branches(args: RewardGradientConfig) -> int:
    """Branches of guidance that one process runs."""
    return 2 // args.guidance_parallel if args.guidance_scale > 1 else 1


def branches_with_gradient(args: RewardGradientConfig) -> int:
    """Branches of guidance that carry the gradient, of those that one process runs."""
    return run_branches(args) if args.guidance_gradient == "full" else 1


def _graphs(args: RewardGradientConfig) -> int:
    """Calls of the transformer whose graphs are there at once, if nothing is done about it."""
    return max(1, window_steps(args)) * max(1, branches_with_gradient(args) // together(args))


def _evaluation(parts: Parts, args: RewardGradientConfig) -> int:
    """A whole video without gradient; of its judges only the weights are counted."""
    batch = args.per_device_eval_batch_size
    sampling = parts.branch(args, batch * together(args), with_gradient=False).sampling
    decoding = parts.decoder(args, batch, args.num_frames, with_gradient=False).sampling
    return max(sampling.most - sampling.start, decoding.most - decoding.start)


def _held(parts: Parts, args: RewardGradientConfig, rewards: Rewards) -> dict[str, int]:
    size = parts.transformer.dtype.itemsize
    of_trained = MASTER_BYTES + MOMENT_BYTES + (4 if args.ema_decay else 0)
    held = {
        "transformer": _base(args, parts.frozen, size, parts.processes),
        "adapter and optimizer": parts.adapter_bytes + int(parts.trained * of_trained),
        "VAE": sum(p.numel() for p in parts.vae.parameters()) * getattr(torch, args.vae_dtype).itemsize,
        "rewards": rewards.weights,
        "position table": parts.tokens * parts.transformer.inner_dim * size,
    }
    return held | ({"sampling copy": _copy(parts)} if args.sampling_weights != "own" else {})


def gathered_bytes(parts: Parts, args: RewardGradientConfig) -> int:
    """Bytes of a sharded base that are whole while the transformer runs: two blocks, and all but the blocks."""
    _, of_one, rest = parts.frozen
    return parts.transformer.dtype.itemsize * (2 * of_one + rest) if args.shard_base else 0


def _base(args: RewardGradientConfig, frozen: tuple[int, int, int], size: int, processes: int) -> int:
    of_blocks, of_one, rest = frozen
    if args.stream_weights:
        return size * (2 * of_one + rest)
    if args.shard_base:
        return size * (of_blocks + rest) // processes
    return size * rest + of_blocks * (args.base_bits or 8 * size) // 8


def _copy(parts: Parts) -> int:
    """Bytes of the float8 copy's own layers: one a weight."""
    total = 0
    for name, module in parts.transformer.transformer_blocks.named_modules():
        if isinstance(module, LoraLayer):
            total += module.base_layer.weight.numel()
        elif isinstance(module, nn.Linear):
            total += 0 if ".norm" in name or "lora_" in name or "base_layer" in name else module.weight.numel()
    return total
