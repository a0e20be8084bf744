"""Peak memory of one rank, by phase. Each phase adds up traced calls, as the trainer makes them.

The bytes are those that PyTorch counts as allocated. Rewards are taken as measured
(`rlhf.planner.reward_costs`). A process takes more of a device: the vendor's context and kernels
(`Rates.context_bytes`), and blocks that PyTorch's allocator caches.
"""

from dataclasses import dataclass

import torch

from rewards.catalogue import CATALOGUE
from rewards.contract import split_spec
from rewards.load import resolve_paths
from rewards.models.latent_reward import NAME as LATENT_REWARD
from rewards.models.latent_reward import read_facts
from rlhf.config import RewardGradientConfig
from rlhf.device import RATED_KIND
from rlhf.method.options import SCORES_ALONE, read_options
from rlhf.planner.reward_costs import decoded_frames, reward_cost, scored_frames
from rlhf.planner.traced import TracedCall, TracedModel, max_graphs

ENCODING, EVALUATION = "encoding prompts", "evaluation"
# Bytes of one trained parameter.
MASTER_BYTES = 8  # float32 master weight and gradient
MOMENT_BYTES = 8  # AdamW's two float32 moments
EMA_BYTES = 4
MOVED_BYTES = 8  # the moved and the former masters of `weight_perturbation`


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device. held: all the time. phases: peak of each phase above what is held."""

    held: dict[str, int]
    phases: dict[str, int]

    @property
    def held_bytes(self) -> int:
        """Bytes that are held all the time."""
        return sum(self.held.values())

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of the run."""
        return self.held_bytes + self.phases[self.peak_phase]

    @property
    def peak_phase(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=self.phases.get)


@dataclass(frozen=True)
class RewardNeeds:
    """Memory and time of the training rewards and of the judges."""

    decoded_frames: int  # leading frames of a video
    weight_bytes: int  # of rewards and judges
    largest_bytes: int  # weights of the largest of them
    peak_bytes: int  # of the reward that takes most, above the weights
    seconds: float  # of all measured rewards, forward and backward, on the device of `COSTS_FILE`
    traced: tuple[TracedCall, ...] = ()  # of rewards that are traced instead
    unknown: tuple[str, ...] = ()  # rewards that are left out, since their cost is not known


def plan_rewards(model: TracedModel, args: RewardGradientConfig, kind: str = RATED_KIND) -> RewardNeeds:
    """Return what the rewards need for one batch, and the weights of the judges.

    kind: the kind of the run's devices, such as "cuda". A reward on another device
    takes time, but none of their memory.
    """
    fps, batch, kwargs = model.card["sampling"]["fps"], args.per_device_train_batch_size, args.reward_kwargs or {}
    trained, judges = (list(map(split_spec, specs)) for specs in (args.reward_funcs, args.eval_reward_funcs))
    built_in = {name: spec for name, spec in trained if spec in CATALOGUE}
    unknown = [spec for _, spec in trained if spec not in CATALOGUE]
    settings = {name: kwargs.get(name, {}) for name in built_in}
    decoded = {name: decoded_frames(spec, settings[name], args.num_frames) for name, spec in built_in.items()}
    frames = args.num_frames if unknown else max(decoded.values())
    window = args.decode_window or frames
    costs, traced = {}, {}
    for name, spec in built_in.items():
        scored = scored_frames(spec, settings[name], min(decoded[name], window), fps)
        if spec == LATENT_REWARD:
            continue
        if found := reward_cost(spec, settings[name], batch * scored):
            costs[name] = found
        elif spec == "nano_preference":
            traced[name] = model.nano_preference_call(batch, min(frames, window))
        else:
            unknown.append(spec)
    heads = {
        name: latent_reward(model, kwargs[name], args) for name, spec in (*trained, *judges) if spec == LATENT_REWARD
    }
    traced |= {name: heads[name][0] for name in built_in if name in heads}
    away = {name for name, given in kwargs.items() if _is_elsewhere(given.get("device"), kind, model.processes)}
    here = [cost for name, cost in costs.items() if name not in away]
    weights = [cost.weight_bytes for cost in here]
    uncounted = [spec for name, spec in (*built_in.items(), *judges) if name not in {*costs, *heads, *away}]
    weights += [CATALOGUE[spec].parameters * CATALOGUE[spec].bytes_each for spec in uncounted if spec in CATALOGUE]
    weights += [size for name, (_, size) in heads.items() if name not in away]
    peaks = [cost.peak_bytes for cost in here]
    peaks += [call.peak_bytes for name, call in traced.items() if name not in away]
    seconds = sum(cost.seconds for cost in costs.values())
    largest = max(weights, default=0)
    return RewardNeeds(
        frames, sum(weights), largest, max(peaks, default=0), seconds, tuple(traced.values()), tuple(unknown)
    )


def latent_reward(model: TracedModel, kwargs: dict, args: RewardGradientConfig) -> tuple[TracedCall, int]:
    """Return the call of a `latent_reward` with these arguments, and the bytes of its weights."""
    facts = read_facts(resolve_paths(kwargs["path"], args.base_dir))
    return model.latent_reward_call(args.per_device_train_batch_size, facts.blocks, kwargs.get("recompute", True))


def _is_elsewhere(device: str | None, kind: str, processes: int) -> bool:
    """Return whether a reward's `device` is none of the run's devices.

    All processes are assumed to be on one host, with the devices 0 to `processes` - 1.
    """
    name, _, number = (device or kind).partition(":")
    return name != kind or int(number or 0) >= processes


def plan_memory(
    model: TracedModel, args: RewardGradientConfig, rewards: RewardNeeds, encoder_bytes: int = 0
) -> MemoryPlan:
    """Return what one rank holds all the time, and the peak of each phase above it.

    args: may differ from `model.args` only in settings of speed and memory.
    rewards: `plan_rewards` of the same args.
    encoder_bytes: memory to encode the prompts with the largest encoder. It is in use before the
        transformer is loaded, when only the rewards are held.
    """
    batch = args.per_device_train_batch_size
    branch = model.transformer_call(args, batch * branches_per_batch(args))
    decoder = model.decoder_call(args, batch, rewards.decoded_frames)
    graphs = num_graphs(args)
    # With `stepwise_backward` each graph is built when its backward pass begins.
    waiting_graphs = 0 if args.stepwise_backward else graphs * branch.saved_bytes
    other_graphs = 0 if args.stepwise_backward else (graphs - 1) * branch.saved_bytes
    adapter_gradient = model.adapter_bytes if graphs > 1 else 0  # of the graphs before
    video = 4 * batch * 3 * rewards.decoded_frames * args.height * args.width  # float32, kept for the log
    if args.method in SCORES_ALONE:  # nothing of scoring is kept for a backward pass
        decoder, waiting_graphs = model.decoder_call(args, batch, rewards.decoded_frames, False), 0
    if args.method == "adjoint_matching":  # latents are scored before there is any graph of velocities
        waiting_graphs = 0
    decode_bytes = max(decoder.peak_bytes, decoder.no_grad.added_bytes)
    held, gathered = _resident_bytes(model, args, rewards), _gathered_bytes(model, args)
    not_yet_held = sum(held.values()) - held["rewards"]
    phases = {
        ENCODING: max(0, encoder_bytes - not_yet_held),
        "sampling": gathered + branch.no_grad.added_bytes,
        "gradient window": gathered + other_graphs + adapter_gradient + branch.peak_bytes + video,
        "decode": waiting_graphs + decode_bytes,
        "reward": waiting_graphs + decoder.saved_bytes + rewards.peak_bytes,
        "optimizer": 4 * model.num_trained if model.processes > 1 else 0,  # a copy is all-reduced
    }
    if args.anchor_data:
        phases["encoding videos"] = model.encoder_call(args).no_grad.added_bytes
    if args.eval_prompts:
        phases[EVALUATION] = gathered + _evaluation_bytes(model, args)
    return MemoryPlan(held, phases)


def num_graphs(args: RewardGradientConfig) -> int:
    """Return how many autograd graphs of transformer calls exist at once.

    `stepwise_backward` is ignored here. With it, a graph exists only during its backward pass.
    """
    return max_graphs(args) * max(1, grad_branches_per_rank(args) // branches_per_batch(args))


def branches_per_batch(args: RewardGradientConfig) -> int:
    """Return 2 if both guidance branches run as one batch, else 1."""
    return 2 if args.guidance_together and args.guidance_scale > 1 else 1


def branches_per_rank(args: RewardGradientConfig) -> int:
    """Return how many guidance branches one rank runs, 1 or 2."""
    return 2 // args.guidance_parallel if args.guidance_scale > 1 else 1


def grad_branches_per_rank(args: RewardGradientConfig) -> int:
    """Return how many guidance branches of one rank carry the gradient."""
    return branches_per_rank(args) if args.guidance_gradient == "full" else 1


def _evaluation_bytes(model: TracedModel, args: RewardGradientConfig) -> int:
    """Return the peak of sampling and decoding held-out videos, without that of the judges."""
    batch, training, model = args.per_device_eval_batch_size, model, model.at_eval_size()
    sampling = model.transformer_call(args, batch * branches_per_batch(args), with_gradient=False)
    decoding = model.decoder_call(args, batch, model.args.num_frames, with_gradient=False)
    peak = max(sampling.no_grad.added_bytes, decoding.no_grad.added_bytes)
    return peak + (0 if model.latent_shape == training.latent_shape else _position_table_bytes(model))


def _resident_bytes(model: TracedModel, args: RewardGradientConfig, rewards: RewardNeeds) -> dict[str, int]:
    """Return the bytes that one rank holds all the time, by part."""
    options = read_options(args.method, args.method_kwargs)
    averages = bool(args.ema_decay) + hasattr(options, "old_decay")
    trained_bytes = MASTER_BYTES + MOMENT_BYTES + averages * EMA_BYTES
    trained_bytes += MOVED_BYTES if options.weight_perturbation else 0
    return {
        "transformer": _base_bytes(model, args),
        "adapter and optimizer": model.adapter_bytes + model.num_trained * trained_bytes,
        "VAE": model.vae.num_parameters() * getattr(torch, args.vae_dtype).itemsize,
        "rewards": rewards.weight_bytes,
        "position table": _position_table_bytes(model),
    }


def _position_table_bytes(model: TracedModel) -> int:
    """Return the bytes of the transformer's cached position embeddings, 0 if it keeps none."""
    return model.transformer.position_bytes(model.num_tokens)


def _base_bytes(model: TracedModel, args: RewardGradientConfig) -> int:
    """Return the bytes of the frozen transformer that are always on the device."""
    frozen, itemsize = model.frozen, model.itemsize
    if args.stream_weights:
        return itemsize * (2 * frozen.largest_block + frozen.rest)
    if args.shard_base:
        return itemsize * (frozen.blocks + frozen.rest) // model.processes
    return itemsize * frozen.rest + frozen.blocks * (args.base_bits or 8 * itemsize) // 8


def _gathered_bytes(model: TracedModel, args: RewardGradientConfig) -> int:
    """Return the bytes of the gathered weights of a sharded base; 0 for another base.

    These are two blocks and all weights outside of the blocks.
    """
    whole = 2 * model.frozen.largest_block + model.frozen.rest
    return model.itemsize * whole if args.shard_base else 0
