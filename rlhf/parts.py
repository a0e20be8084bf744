"""The parts of an optimizer step, run on tensors without storage: what each would hold, compute and move.

Shape legend: B batch, C channels, T latent frames, H W latent height and width, N video tokens, L text tokens.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from rlhf.config import RewardGradientConfig
from rlhf.contentv.blocks import BlockRunner
from rlhf.contentv.transformer import SD3Transformer3DModel
from rlhf.contentv.wan_decoder import decode_video
from rlhf.exchange import Group
from rlhf.layout import Sizes
from rlhf.lora import add_adapter, lora_config
from rlhf.method.options import read_options
from rlhf.speed import Speed
from rlhf.trace import Elsewhere, Phase, Trace, pretended_group, use_fused_norms

SMALL_MODEL = 1e9  # parameters; above that the loader chooses bfloat16
TRACED_BLOCKS = 4  # of the transformer, which are alike but for the last
TRACED_PIECES = 6  # of a decoder that works piece by piece; the first ones differ
OF_TRANSFORMER = ("gradient_checkpointing", "keep_attention", "offload_activations")
OF_DECODER = ("vae_dtype", "decode_chunk", "decode_checkpoint", "decode_caches", "decode_window")


@dataclass(frozen=True)
class Part:
    """Three ways through the same code; the graph of `forward` is there until `backward` has gone through it."""

    sampling: Phase  # without gradient
    forward: Phase  # with gradient: what is held at its end waits for the backward pass
    backward: Phase

    @property
    def kept(self) -> int:
        """Bytes that wait for the backward pass."""
        return self.forward.end - self.forward.start

    @property
    def gradients(self) -> int:
        """Bytes that it leaves: gradients of trained parameters and inputs."""
        return self.backward.end - self.forward.start


class Parts:
    """The parts of a run on one of so many processes, each traced once for the settings that bear on it.

    args: those of the run, with all sampling keys set; methods take them with other settings about speed and memory.
    card: the model's sizes, as of `rlhf.contentv.files.model_sizes`.
    """

    def __init__(self, args: RewardGradientConfig, card: dict[str, dict], processes: int = 1):
        self.args, self.card, self.traced = args, card, {}
        self.processes, self.sizes = processes, Sizes.of(args, processes)

    @cached_property
    def transformer(self) -> SD3Transformer3DModel:
        """The transformer with its adapter, without storage."""
        return self._make(self.card["transformer"])

    def _make(self, config: dict, dtype: torch.dtype | None = None) -> SD3Transformer3DModel:
        with torch.device("meta"):
            model = SD3Transformer3DModel.from_config(config)
            dtype = dtype or self.dtype(model)
            add_adapter(model, lora_config(self.args), self.args.seed)
        return nn.Module.to(model, dtype)  # on "meta" peft leaves adapters in float32

    @cached_property
    def _small(self) -> list[SD3Transformer3DModel]:
        """Two of few blocks, whose difference is what a block takes; or the whole where blocks are not alike."""
        args, blocks = self.args, self.transformer.config.num_layers
        differ = args.lora_rank_pattern or args.lora_alpha_pattern or args.lora_target_modules
        if differ or blocks <= TRACED_BLOCKS:
            return [self.transformer]
        dtype = self.transformer.dtype
        numbers = (TRACED_BLOCKS - 1, TRACED_BLOCKS)
        return [self._make(self.card["transformer"] | {"num_layers": n}, dtype) for n in numbers]

    @cached_property
    def vae(self) -> AutoencoderKLWan:
        """The VAE, frozen, without storage."""
        with torch.device("meta"):
            return AutoencoderKLWan.from_config(self.card["vae"]).requires_grad_(False).eval()

    def dtype(self, model: nn.Module) -> torch.dtype:
        """The base's number format: as asked, or as the loader chooses by its size."""
        if self.args.dtype == "auto":
            return torch.bfloat16 if sum(p.numel() for p in model.parameters()) > SMALL_MODEL else torch.float32
        return getattr(torch, self.args.dtype)

    @cached_property
    def frozen(self) -> tuple[int, int, int]:
        """Frozen numbers of all blocks, of the largest block, and of the rest of the transformer."""
        blocks = [_frozen(block) for block in self.transformer.transformer_blocks]
        return sum(blocks), max(blocks), _frozen(self.transformer) - sum(blocks)

    @cached_property
    def trained(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.transformer.parameters() if p.requires_grad)

    @cached_property
    def trained_tensors(self) -> int:
        """How many tensors are trained."""
        return sum(p.requires_grad for p in self.transformer.parameters())

    @cached_property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter in the format that the forward pass reads."""
        return sum(p.nbytes for p in self.transformer.parameters() if p.requires_grad)

    @property
    def latents(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one video."""
        args, steps = self.args, self.card["vae"]["temperal_downsample"]
        down = 2 ** len(steps)
        frames = 1 + (args.num_frames - 1) // 2 ** sum(steps)
        return self.card["transformer"]["in_channels"], frames, args.height // down, args.width // down

    @property
    def tokens(self) -> int:
        """How many tokens a video has."""
        _, T, H, W = self.latents
        return T * (H // self.card["transformer"]["patch_size"]) * (W // self.card["transformer"]["patch_size"])

    def branch(self, args: RewardGradientConfig, batch: int, with_gradient: bool = True) -> Part:
        """One call of the transformer, as these args run it."""
        of_latents = window_steps(args) > 1 and args.method != "drtune"  # a step passes on what comes from a later one
        key = ("branch", batch, with_gradient, of_latents, *(getattr(args, name) for name in OF_TRANSFORMER))
        text = self.card["tokenizer"]["model_max_length"] + args.max_sequence_length  # CLIP's and T5's tokens
        shape, speed = (batch, *self.latents), Speed.of(args)

        def trace() -> Part:
            with pretended_group(self.sizes.sequence) as group:
                parts = [
                    trace_transformer(m, shape, text, speed, of_latents, with_gradient, group) for m in self._small
                ]
            left_out = self.transformer.config.num_layers - TRACED_BLOCKS
            return extended(*parts, left_out) if len(parts) > 1 else parts[0]

        return self._once(key, trace)

    def decoder(self, args: RewardGradientConfig, batch: int, frames: int, with_gradient: bool = True) -> Part:
        """The leading frames of a batch of latents to pixels; with a `decode_window`, where that is in the middle."""
        key = ("decoder", batch, frames, with_gradient, *(getattr(args, name) for name in OF_DECODER))
        vae = nn.Module.to(self.vae, getattr(torch, args.vae_dtype))
        C, _, *size = self.latents
        per_latent = 2 ** sum(vae.config.temperal_downsample)

        def trace(latents: int) -> Part:
            wanted = min(frames, 1 + per_latent * (latents - 1))
            return trace_decoder(vae, (batch, C, latents, *size), wanted, args, with_gradient)

        latents, chunk = 1 + -(-(frames - 1) // per_latent), args.decode_chunk
        pieces = 1 if chunk is None or args.decode_window else -(-latents // chunk)
        if pieces <= TRACED_PIECES:
            return self._once(key, lambda: trace(latents))
        left_out = pieces - TRACED_PIECES  # each takes as much as the one before
        few, fewer = (latents - chunk * (left_out + more) for more in (0, 1))
        return self._once(key, lambda: extended(trace(fewer), trace(few), left_out))

    def nano_preference(self, batch: int, frames: int) -> Part:
        """The reward that comes with the package, which is too small to be measured at full size."""
        from rlhf.nano.judges import MAX_WORDS, Preference

        with torch.device("meta"):
            model = Preference().requires_grad_(False).eval()
        ids = torch.empty(batch, MAX_WORDS, dtype=torch.long, device="meta")
        video = torch.empty(batch, 3, frames, self.args.height, self.args.width, device="meta")
        return trace_part(lambda x: model(x, ids), video, True, model)

    def _once(self, key: tuple, make: Callable[[], Part]) -> Part:
        if key not in self.traced:
            self.traced[key] = make()
        return self.traced[key]


def window_steps(args: RewardGradientConfig) -> int:
    """Steps of the rollout that carry the gradient, at most."""
    listed = read_options(args.method, args.method_kwargs).steps if args.method == "listed" else None
    of_method = {"listed": len(listed or []), "refl": 1, "draft_lv": 1, "srpo": 0}
    return of_method.get(args.method, args.num_grad_steps)


def trace_part(
    function: Callable,
    x: torch.Tensor,
    with_gradient: bool,
    *held: nn.Module,
    of_input: bool = True,
    only_gradient: bool = False,
) -> Part:
    """function(x) without gradient; with gradient; and back.

    held: modules whose own tensors are not counted. of_input: x needs a gradient, too. only_gradient: leave the pass
    without gradient out where there is one with it.
    """
    with Trace(*held) as trace:
        trace.know(x)
        with torch.no_grad(), trace.phase() as sampling:
            if not (with_gradient and only_gradient):
                function(x)
        if not with_gradient:
            return Part(sampling, Phase(0), Phase(0))
        for p in (p for module in held for p in module.parameters()):
            p.grad = None
        x.requires_grad_(of_input)
        with trace.phase() as forward:
            y = function(x)
        gradient = torch.empty_like(y)
        with trace.phase() as backward:
            y.backward(gradient)
    return Part(sampling, forward, backward)


def trace_transformer(
    model: SD3Transformer3DModel,
    shape: tuple,
    text_tokens: int,
    speed: Speed | None = None,
    of_latents: bool = False,
    with_gradient: bool = True,
    group: Group | None = None,
) -> Part:
    """One call of the transformer, as `trace_part`, with the position table there already.

    shape: (B, C, T, H, W) of the latents. of_latents: they need a gradient, too. group: shares the tokens.
    """
    speed, make = speed or Speed(), partial(torch.empty, device="meta", dtype=model.dtype)
    B, _, T, H, W = shape
    patch, config = model.config.patch_size, model.config
    grid = (T, H // patch, W // patch)
    model.pos_embed._tables.clear()
    model.pos_embed._tables[grid, torch.device("meta"), model.dtype] = make(T * H * W // patch**2, model.inner_dim)
    conditions = make(B, text_tokens, config.joint_attention_dim), make(B, config.pooled_projection_dim)
    time_B = torch.empty(B, device="meta")
    use_fused_norms(model)
    model.sequence_group = group

    def velocity(x):
        attention = Trace.current().attention
        host = Elsewhere() if speed.offload_activations else None
        model.run_block = BlockRunner(attention, speed.recompute, host)
        return model(x, *conditions, time_B, return_dict=False)[0]

    return trace_part(velocity, make(shape), with_gradient, model, of_input=of_latents)


def trace_decoder(
    vae: AutoencoderKLWan, shape: tuple, frames: int, args: RewardGradientConfig, with_gradient: bool = True
) -> Part:
    """The decoder, as `trace_part`. shape: (B, C, T, H, W) of the latents; frames: leading ones that are wanted."""
    caches = Elsewhere() if args.decode_caches == "host" else None
    window = min(args.decode_window or frames, frames) if with_gradient else frames
    first = (frames - window) // 2  # it is drawn for each step

    def decode(z):
        return decode_video(vae, z, first + window, args.decode_chunk, args.decode_checkpoint, first, caches)

    return trace_part(decode, torch.empty(shape, device="meta"), with_gradient, vae, only_gradient=True)


def extended(fewer: Part, few: Part, times: int) -> Part:
    """`few`, and so many times what it takes more than `fewer`."""
    ways = ("sampling", "forward", "backward")
    return Part(*(_extended(getattr(fewer, way), getattr(few, way), times) for way in ways))


def _extended(fewer: Phase, few: Phase, times: int) -> Phase:
    line = lambda a, b: b + times * (b - a)
    numbers = ("start", "end", "most", "calls", "calls_of_autograd")
    work = Counter({op: line(fewer.work[op], few.work[op]) for op in {*fewer.work, *few.work}})
    return Phase(**{name: line(getattr(fewer, name), getattr(few, name)) for name in numbers}, work=work)


def small_transformer(device: str | torch.device) -> SD3Transformer3DModel:
    """A transformer of four blocks, two heads wide, with an adapter: its time is that of calling operators."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    with torch.device(device):
        model = SD3Transformer3DModel(num_layers=4, **sizes)
        add_adapter(model, lora_config(RewardGradientConfig()), 0)
    return model


def _frozen(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not p.requires_grad)
