"""The memory of a run on one device, phase by phase: what its parts hold, put together as the trainer does.

All of it is worked out on tensors without storage (`rlhf.parts`), but the rewards, which were measured
(`rewards.costs`). It is what PyTorch will report as allocated at most; a process takes more of a device than that: the
vendor's own context, kernels, and blocks that the allocator keeps (`rlhf.rates`).
"""

from dataclasses import dataclass

import torch
from torch import nn

from rewards.catalogue import CATALOGUE
from rewards.costs import Cost, cost, decoded_frames, scored_frames
from rlhf.config import RewardGradientConfig
from rlhf.parts import Part, Parts
from rlhf.trace import Phase

GIB = 2**30
OPTIMIZER_BYTES = 16  # of a trained number: master, gradient, two moments, in float32


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device."""

    held: dict[str, int]  # all the time
    phases: dict[str, int]  # besides, at most

    @property
    def resident(self) -> int:
        return sum(self.held.values())

    @property
    def most(self) -> int:
        return self.resident + max(self.phases.values())


@dataclass(frozen=True)
class Rewards:
    """What those that are trained on need. frames: leading ones that are decoded."""

    frames: int
    weights: int
    memory: int  # of the one that takes most
    seconds: float  # of all, on `rewards.measured.DEVICE`
    traced: tuple[Part, ...] = ()  # of those that are small enough to be traced instead
    unknown: tuple[str, ...] = ()  # whose cost is not in these figures


def plan_rewards(parts: Parts) -> Rewards:
    """Of args.reward_funcs on one batch; the weights are those of args.eval_reward_funcs, too."""
    args, fps = parts.args, parts.card["sampling"].get("fps", 24)
    batch, kwargs = args.per_device_train_batch_size, args.reward_kwargs or {}
    known = {name: kwargs.get(name, {}) for name in args.reward_funcs if name in CATALOGUE}
    total, unknown = args.num_frames, [name for name in args.reward_funcs if name not in CATALOGUE]
    decoded = {name: decoded_frames(name, settings, total) for name, settings in known.items()}
    frames = total if unknown else max(decoded.values())
    costs, traced = {}, []
    for name, settings in known.items():
        scored = scored_frames(name, settings, min(frames, args.decode_window or frames), fps)
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
    """Held at most, there or back."""
    return max(part.forward.most, part.backward.most) - part.forward.start


def plan_memory(parts: Parts, args: RewardGradientConfig, rewards: Rewards) -> MemoryPlan:
    """args: as those of parts, but for settings about speed and memory."""
    batch, both = args.per_device_train_batch_size, args.guidance_together and args.guidance_scale > 1
    branch = parts.branch(args, 2 * batch if both else batch)
    decoder = parts.decoder(args, batch, rewards.frames)
    graphs = graded_graphs(args)
    waiting = 0 if args.stepwise_backward else graphs * branch.kept
    video = decoder.forward.end - decoder.forward.start if args.stepwise_backward else _video_bytes(parts, rewards)
    others = waiting - branch.kept if waiting else 0
    adapter = parts.trained * branch_dtype(parts).itemsize if graphs > 1 else 0  # gradients of the graphs before
    phases = {
        "sampling": _extra(branch.sampling),
        "gradient segment": others + adapter + max(_extra(branch.forward), _back(branch)) + min(video, GIB),
        "decoding and back": waiting + most_of(decoder),
        "reward and back": waiting + decoder.kept + rewards.memory,
        "optimizer": 0,
    }
    if args.eval_prompts:
        phases["evaluation"] = _evaluation(parts, args)
    return MemoryPlan(_held(parts, args, rewards), phases)


def graded_graphs(args: RewardGradientConfig) -> int:
    """Calls of the transformer whose graphs coexist if nothing is done about it."""
    branches = 2 if args.guidance_scale > 1 and args.guidance_gradient == "full" else 1
    steps = {"listed": len(args.grad_steps or []), "refl": 1, "draft_lv": 1, "srpo": 1}.get(
        args.method, args.num_grad_steps
    )
    return max(1, branches * steps // (2 if args.guidance_together and branches == 2 else 1))


def branch_dtype(parts: Parts) -> torch.dtype:
    return parts.transformer.dtype


def _extra(phase: Phase) -> int:
    return phase.most - phase.start


def _back(branch: Part) -> int:
    return branch.backward.most - branch.forward.start


def _video_bytes(parts: Parts, rewards: Rewards) -> int:
    """The video that was scored is still there when the denoiser's turn has come."""
    args = parts.args
    return args.per_device_train_batch_size * 3 * rewards.frames * args.height * args.width * 4


def _evaluation(parts: Parts, args: RewardGradientConfig) -> int:
    """A whole video without gradient; the judges of which only the weights are known are left out."""
    batch = args.per_device_eval_batch_size
    sampling = parts.branch(args, batch * (2 if args.guidance_together else 1), with_gradient=False)
    decoding = parts.decoder(args, batch, args.num_frames, with_gradient=False)
    return max(_extra(sampling.sampling), _extra(decoding.sampling))


def _held(parts: Parts, args: RewardGradientConfig, rewards: Rewards) -> dict[str, int]:
    size, trained = branch_dtype(parts).itemsize, parts.trained
    vae = sum(p.numel() for p in parts.vae.parameters()) * getattr(torch, args.vae_dtype).itemsize
    table = parts.tokens * parts.transformer.inner_dim * size
    average = 4 if args.ema_decay else 0
    held = {
        "transformer": _base(args, parts.frozen, size),
        "adapter and optimizer": trained * (size + OPTIMIZER_BYTES + average),
        "VAE": vae,
        "rewards": rewards.weights,
        "position table": table,
    }
    return held | ({"sampling copy": _copy(parts, args, size)} if args.sampling_weights != "own" else {})


def _base(args: RewardGradientConfig, frozen: tuple[int, int, int], size: int) -> int:
    of_blocks, of_one, rest = frozen
    if args.stream_weights:
        return size * (2 * of_one + rest)
    return size * rest + of_blocks * (args.base_bits or 8 * size) // 8


def _copy(parts: Parts, args: RewardGradientConfig, size: int) -> int:
    """Of merged layers in the base's format; of all linear layers of the blocks in one byte a weight."""
    from peft.tuners.lora import LoraLayer

    blocks = parts.transformer.transformer_blocks.modules()
    if args.sampling_weights == "float8":
        linear = {id(m.weight): m.weight.numel() for m in blocks if isinstance(m, nn.Linear) and m.in_features > 512}
        return sum(linear.values())
    return sum(m.base_layer.weight.numel() for m in blocks if isinstance(m, LoraLayer)) * size


__all__ = ["Cost", "MemoryPlan", "Rewards", "graded_graphs", "most_of", "plan_memory", "plan_rewards"]
