"""The transformer, the decoder and the nano reward of a run, traced on tensors without storage.

Shape legend: B batch, C channels, T latent frames, H W latent height and width.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from rlhf.adapter.lora import LAYER_SETS, add_adapter, lora_config
from rlhf.config import RewardGradientConfig, at_eval_size
from rlhf.distributed.layout import Sizes
from rlhf.execution.apply import ExecutionOptions
from rlhf.execution.blocks import BlockRunner
from rlhf.generator.files import latent_sizes
from rlhf.generator.first_blocks import FirstBlocks, first_blocks
from rlhf.generator.registry import family_of_config, spatial_patch
from rlhf.generator.wan_decoder import decode_video
from rlhf.generator.wan_encoder import encode_video
from rlhf.method.options import read_options
from rlhf.planner.tracer import MetaOffload, Phase, Trace, fake_process_group, fused_attention, use_fused_norms

BFLOAT16_PARAMETERS = 1e9  # from so many parameters on, dtype "auto" loads bfloat16
# Equal blocks and equal chunks are not all traced: two short traces are extrapolated.
TRACED_BLOCKS = 4
TRACED_CHUNKS = 6  # the first and the last differ
# Settings that change a trace; calls with equal settings are traced once.
TRANSFORMER_SETTINGS = ("gradient_checkpointing", "keep_attention", "offload_activations")
DECODER_SETTINGS = ("vae_dtype", "decode_chunk", "decode_checkpoint", "decode_caches", "decode_window")


@dataclass(frozen=True)
class TracedCall:
    """One call traced without gradient, with gradient, and backward."""

    no_grad: Phase
    forward: Phase
    backward: Phase

    @property
    def saved_bytes(self) -> int:
        """Bytes held between the forward and the backward pass, the result included."""
        return self.forward.bytes_after - self.forward.bytes_before

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of the forward and backward pass above the bytes held before."""
        return max(self.forward.peak_bytes, self.backward.peak_bytes) - self.forward.bytes_before


NOTHING = TracedCall(Phase(0), Phase(0), Phase(0))


class FrozenCounts(NamedTuple):
    """Numbers of the transformer's frozen parameters. rest: outside of the blocks."""

    blocks: int
    largest_block: int
    rest: int


class TracedModel:
    """A run's transformer and decoder on "meta", for one of `processes` ranks.

    args: the run's settings, with all sampling keys set. Functions of this class that take `args`
        accept other settings of speed and memory. Each distinct call is traced once.
    card: the model's sizes, as `rlhf.generator.files.model_sizes` returns them.
    """

    def __init__(self, args: RewardGradientConfig, card: dict[str, dict], processes: int = 1):
        self.args, self.card, self.processes = args, card, processes
        self.layout = Sizes.from_settings(args, processes)
        self.traces: dict[tuple, TracedCall] = {}

    @cached_property
    def transformer(self) -> nn.Module:
        """The transformer with its adapter."""
        return self._build_transformer(self.card["transformer"])

    def _build_transformer(self, config: dict, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a transformer with its adapter on "meta"; dtype: None for the loader's choice."""
        with torch.device("meta"):
            model = family_of_config(config).classes.transformer.from_config(config)
            dtype = dtype or self._base_dtype(model)
            add_adapter(model, lora_config(self.args), self.args.seed)
        return nn.Module.to(model, dtype)  # on "meta" peft leaves adapters in float32

    @cached_property
    def _short_transformers(self) -> list[nn.Module]:
        """Transformers of three and four blocks; the whole one if blocks differ."""
        args, num_blocks = self.args, self.transformer.config.num_layers
        named_layers = set(args.lora_target_modules or []) - set(LAYER_SETS)  # blocks may differ
        if named_layers or num_blocks <= TRACED_BLOCKS:
            return [self.transformer]
        config, dtype = self.card["transformer"], self.transformer.dtype
        lengths = (TRACED_BLOCKS - 1, TRACED_BLOCKS)
        return [self._build_transformer(config | {"num_layers": length}, dtype) for length in lengths]

    @cached_property
    def vae(self) -> AutoencoderKLWan:
        """The frozen VAE on "meta": shapes without weights."""
        with torch.device("meta"):
            return AutoencoderKLWan.from_config(self.card["vae"]).requires_grad_(False).eval()

    def _base_dtype(self, model: nn.Module) -> torch.dtype:
        """Return the base's number format, as the loader chooses it."""
        if self.args.dtype == "auto":
            return torch.bfloat16 if model.num_parameters() > BFLOAT16_PARAMETERS else torch.float32
        return getattr(torch, self.args.dtype)

    @cached_property
    def frozen(self) -> FrozenCounts:
        """Counts of the transformer's frozen parameters."""
        blocks = [_count_frozen(block) for block in self.transformer.transformer_blocks]
        return FrozenCounts(sum(blocks), max(blocks), _count_frozen(self.transformer) - sum(blocks))

    @cached_property
    def itemsize(self) -> int:
        """Bytes of one element of the transformer's frozen weights."""
        return self.transformer.dtype.itemsize

    @cached_property
    def num_trained(self) -> int:
        """The number of trained parameters."""
        return self.transformer.num_parameters(only_trainable=True)

    @cached_property
    def adapter_bytes(self) -> int:
        """Bytes of the trained parameters in the format that the forward pass reads."""
        return sum(p.nbytes for p in self.transformer.parameters() if p.requires_grad)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one video's latents."""
        args = self.args
        return latent_sizes(self.card).shape(args.num_frames, args.height, args.width)

    @property
    def num_tokens(self) -> int:
        """The number of one video's tokens."""
        (_, T, H, W), patch = self.latent_shape, spatial_patch(self.card["transformer"])
        return T * (H // patch) * (W // patch)

    def at_eval_size(self) -> "TracedModel":
        """Return the same model for videos of the evaluation's size."""
        sized = copy.copy(self)  # which shares modules and traces
        sized.args = at_eval_size(self.args)
        return sized

    def transformer_call(self, args: RewardGradientConfig, batch: int, with_gradient: bool = True) -> TracedCall:
        """Trace one call of the transformer on a batch."""
        # All but the first step of a window pass a gradient on to the step before; DRTune detaches
        # it.
        to_latents = max_graphs(args) > 1 and args.method != "drtune"
        settings = [getattr(args, name) for name in TRANSFORMER_SETTINGS]

        def trace(model: nn.Module) -> TracedCall:
            velocity, x = self._velocity_and_latents(model, ExecutionOptions.from_settings(args), batch)
            return trace_call(velocity, x, model, with_gradient=with_gradient, to_input=to_latents)

        def trace_all() -> TracedCall:
            with fake_process_group(self.layout.sequence) as group:
                for model in self._short_transformers:
                    model.sequence_group = group
                calls = [trace(model) for model in self._short_transformers]
            left_out = self.transformer.config.num_layers - TRACED_BLOCKS
            return extrapolate(*calls, left_out) if len(calls) > 1 else calls[0]

        return self._trace_once(("transformer", batch, with_gradient, to_latents, *settings), trace_all)

    def _velocity_and_latents(
        self, model: nn.Module, speed: ExecutionOptions, batch: int
    ) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
        """Return the function from latents to velocity, as in training, and "meta" latents."""
        family = family_of_config(self.card["transformer"])
        text_tokens = family.text_tokens(self.card, self.args.max_sequence_length)
        conditions = model.trace_inputs(batch, self.latent_shape, text_tokens)
        use_fused_norms(model)

        def velocity(x):
            host = MetaOffload() if speed.offload_activations else None
            model.run_block = BlockRunner(fused_attention, speed.recompute, host, parts=model.block_parts)
            return model(x, *conditions, return_dict=False)[0]

        return velocity, torch.empty(batch, *self.latent_shape, device="meta", dtype=model.dtype)

    def encoder_call(self, args: RewardGradientConfig) -> TracedCall:
        """Trace encoding one real video, without gradient."""
        video = torch.empty(1, 3, args.num_frames, args.height, args.width, device="meta")

        def trace() -> TracedCall:
            vae = nn.Module.to(self.vae, getattr(torch, args.vae_dtype))
            return trace_call(lambda x: encode_video(vae, x), video, vae, with_gradient=False)

        return self._trace_once(("encoder", args.vae_dtype), trace)

    def decoder_call(
        self, args: RewardGradientConfig, batch: int, frames: int, with_gradient: bool = True
    ) -> TracedCall:
        """Trace decoding the leading `frames`.

        A `decode_window` is placed in the middle of these frames.
        """
        if frames == 0:  # all rewards score latents
            return NOTHING
        settings = [getattr(args, name) for name in DECODER_SETTINGS]
        vae, chunk = self.vae, args.decode_chunk
        C, _, *size = self.latent_shape
        frames_per_latent = 2 ** sum(vae.config.temperal_downsample)

        def trace(latents: int) -> TracedCall:
            wanted = min(frames, 1 + frames_per_latent * (latents - 1))
            window = min(args.decode_window or wanted, wanted) if with_gradient else wanted
            first = (wanted - window) // 2  # training draws it for each step
            options = chunk, args.decode_checkpoint, first
            caches = MetaOffload() if args.decode_caches == "host" else None
            decode = lambda z: decode_video(vae, z, first + window, *options, caches)
            z = torch.empty(batch, C, latents, *size, device="meta")
            return trace_call(decode, z, vae, with_gradient=with_gradient, skip_no_grad=True)

        def trace_all() -> TracedCall:
            nn.Module.to(vae, getattr(torch, args.vae_dtype))
            latents = 1 + -(-(frames - 1) // frames_per_latent)
            chunks = 1 if chunk is None or args.decode_window else -(-latents // chunk)
            left_out = chunks - TRACED_CHUNKS
            if left_out <= 0:
                return trace(latents)
            longer = latents - chunk * left_out
            return extrapolate(trace(longer - chunk), trace(longer), left_out)

        return self._trace_once(("decoder", batch, frames, with_gradient, *settings), trace_all)

    def latent_reward_call(self, batch: int, count: int, recompute: bool) -> tuple[TracedCall, int]:
        """Trace the transformer blocks that `latent_reward` uses.

        Return the call and the bytes of their weights. The head on the blocks is small and left
        out.
        """
        large = self.transformer.num_parameters() > BFLOAT16_PARAMETERS
        with torch.device("meta"):
            cut = first_blocks(self.card["transformer"], count)
        cut = nn.Module.to(cut, torch.bfloat16 if large else torch.float32)
        blocks = FirstBlocks(cut, recompute)
        blocks.runner.attention = blocks.runner.inference_attention = fused_attention
        use_fused_norms(cut)
        tokens = family_of_config(self.card["transformer"]).text_tokens(self.card, self.args.max_sequence_length)
        text, pooled, _ = cut.trace_inputs(batch, self.latent_shape, tokens)
        latents = torch.empty(batch, *self.latent_shape, device="meta")
        call = trace_call(lambda x: blocks(x, 0.5, text, pooled), latents, blocks)
        return call, sum(p.nbytes for p in cut.parameters()) + cut.position_bytes(self.num_tokens)

    def nano_preference_call(self, batch: int, frames: int) -> TracedCall:
        """Trace the reward nano_preference at the run's size, since `COSTS` does not have it."""
        from rlhf.nano.judges import MAX_WORDS, Preference

        with torch.device("meta"):
            model = Preference().requires_grad_(False).eval()
        ids = torch.empty(batch, MAX_WORDS, dtype=torch.long, device="meta")
        video = torch.empty(batch, 3, frames, self.args.height, self.args.width, device="meta")
        return trace_call(lambda x: model(x, ids), video, model)

    def _trace_once(self, key: tuple, trace: Callable[[], TracedCall]) -> TracedCall:
        """Return the call of this key; trace it if there is none yet."""
        key = key, self.latent_shape
        if key not in self.traces:
            self.traces[key] = trace()
        return self.traces[key]


def max_grad_steps(args: RewardGradientConfig) -> int:
    """Return the largest number of rollout steps that carry the gradient."""
    options = read_options(args.method, args.method_kwargs)
    listed = getattr(options, "steps", None) or []
    by_method = {"listed": len(listed), "refl": 1, "draft_lv": 1, "prfl": 1}
    by_method |= dict.fromkeys(("srpo", "leap_align", "adjoint_matching", "nft", "flow_grpo"), 0)
    return by_method.get(args.method, args.num_grad_steps)


def max_graphs(args: RewardGradientConfig) -> int:
    """Return how many velocities of a batch have a graph at the same time, at most."""
    return 2 if args.method == "leap_align" else max(1, max_grad_steps(args))


def trace_call(
    function: Callable,
    x: torch.Tensor,
    *modules: nn.Module,
    with_gradient: bool = True,
    to_input: bool = True,
    skip_no_grad: bool = False,
) -> TracedCall:
    """Trace function(x) without gradient, then with gradient, then its backward pass.

    modules: their own tensors are not counted. to_input: x needs a gradient. skip_no_grad: leave
    out the call without gradient; ignored unless `with_gradient`.
    """
    with Trace(*modules) as trace:
        trace.ignore(x)
        with torch.no_grad(), trace.phase() as no_grad:
            if not (with_gradient and skip_no_grad):
                function(x)
        if not with_gradient:
            return TracedCall(no_grad, Phase(0), Phase(0))
        for p in (p for module in modules for p in module.parameters()):
            p.grad = None
        x.requires_grad_(to_input)
        with trace.phase() as forward:
            y = function(x)
        gradient = torch.empty_like(y)
        with trace.phase() as backward:
            y.backward(gradient)
    return TracedCall(no_grad, forward, backward)


def extrapolate(shorter: TracedCall, longer: TracedCall, extra: int) -> TracedCall:
    """Return `longer` plus `extra` times its difference from `shorter`."""
    phases = zip(vars(shorter).values(), vars(longer).values(), strict=True)
    return TracedCall(*(_extrapolate_phase(a, b, extra) for a, b in phases))


def _extrapolate_phase(shorter: Phase, longer: Phase, extra: int) -> Phase:
    """Return `longer` plus `extra` times its difference from `shorter`, field by field."""
    line = lambda a, b: b + extra * (b - a)
    names = ("bytes_before", "bytes_after", "peak_bytes")
    sizes = {name: line(getattr(shorter, name), getattr(longer, name)) for name in names}
    counts = {}
    for name in ("work", "offloaded"):
        a, b = getattr(shorter, name), getattr(longer, name)
        counts[name] = Counter({key: line(a[key], b[key]) for key in {*a, *b}})
    return Phase(**sizes, **counts)


def _count_frozen(module: nn.Module) -> int:
    """Return the number of frozen parameters."""
    return sum(p.numel() for p in module.parameters() if not p.requires_grad)
