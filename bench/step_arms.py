"""The arms that bench/step.py compares, and the model with random weights that they run on.

Shape legend: B batch, C channels, T latent frames or frames, H W height and width, N video tokens,
L text tokens.
"""

from dataclasses import dataclass

import diffusers
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from diffusers.models.normalization import RMSNorm

from rewards.models.latent_reward import PUBLISHED_BLOCKS, LatentReward
from rlhf.adapter.lora import add_adapter, lora_config
from rlhf.adapter.masters import MasterWeights
from rlhf.adapter.optimizer import make_optimizer
from rlhf.config import RewardGradientConfig
from rlhf.contentv.transformer import QueryKeyNorm, SD3Transformer3DModel
from rlhf.device import generator
from rlhf.distributed.layout import Layout
from rlhf.execution.apply import ExecutionOptions, set_up_blocks
from rlhf.execution.blocks import BlockRunner
from rlhf.execution.offload import HostMemory
from rlhf.generator.flow import flow_sigmas
from rlhf.generator.wan_decoder import decode_unclamped, unnormalise
from rlhf.method.decode import Decoder
from rlhf.method.options import read_options
from rlhf.method.velocity import Guidance, VelocityFields
from rlhf.types import Conditioning
from rlhf.wan.facts import LARGE as LARGE_WAN
from rlhf.wan.facts import SMALL as SMALL_WAN
from rlhf.wan.transformer import WanTransformer3DModel

PEERS, STOCK = "peers' way", "stock autograd"
TOGETHER = "a quarter of the steps, rollouts used 4 times"
FA3 = ", FlashAttention-3"
EXACT_BEST = f"exact, nothing twice, compiled{FA3}, guidance together"
ROOMY = {"vae_dtype": "bfloat16"}  # as the peers'; nothing is computed twice
EXACT = ROOMY | {
    "gradient_checkpointing": True,
    "keep_attention": True,
    "stepwise_backward": True,
    "decode_chunk": 1,
    "decode_checkpoint": True,
    "decode_caches": "host",
}
FAST = ROOMY | {"compile_blocks": True}
CHEAP = FAST | {"prefix_steps": 6, "rollout_reuse": 4}  # 6 of 24 steps before the window
LEAPS, ADJOINT, SRPO = ({"method": name} for name in ("leap_align", "adjoint_matching", "srpo"))
OFFLINE = {"method_kwargs": {"offline": True}}
PRFL = {"method": "prfl", "method_kwargs": {"drawn_steps": 1}}  # the last step: the longest way to it
SMALL = EXACT | {"keep_attention": False, "stream_weights": True}
# TFLOP/s on an H200: bf16 products, measured; attention with heads of 64, as published for
# FlashAttention-3.
MATRIX, ATTENTION_FORWARD, ATTENTION_BACKWARD = 790e12, 497e12, 474e12
SETTINGS = {
    PEERS: ROOMY | {"gradient_checkpointing": True},
    STOCK: ROOMY,
    # The exact gradient.
    "exact": EXACT,
    "exact, PyTorch's attention kernel": EXACT | {"attention_kernel": "default"},
    "exact, attention computed again": EXACT | {"keep_attention": False},
    "exact, compiled": EXACT | {"compile_blocks": True},
    "exact, caches kept, chunks of 4": EXACT | {"decode_caches": "keep", "decode_chunk": 4},
    "exact, VAE in float32": EXACT | {"vae_dtype": "float32", "decode_chunk": 2},
    "exact, activations on the host": EXACT | {"offload_activations": True},
    "exact, weights streamed": EXACT | {"stream_weights": True},
    "exact, nothing twice": ROOMY,
    "exact, nothing twice, guidance together": ROOMY | {"guidance_together": True},
    "exact, nothing twice, compiled": FAST,
    f"exact, nothing twice, compiled{FA3}": FAST,
    EXACT_BEST: FAST | {"guidance_together": True},
    "24 GiB": SMALL,
    # With the robust gradients, as the study has them.
    "exact, nothing twice, moved video": ROOMY | {"method_kwargs": {"reward_perturbation": 0.005}},
    "exact, nothing twice, moved adapter": ROOMY | {"method_kwargs": {"weight_perturbation": 0.05}},
    # Methods that learn from the whole rollout, or from real videos instead.
    "srpo": EXACT | SRPO,
    "srpo, nothing twice": ROOMY | SRPO,
    "srpo, offline": EXACT | SRPO | OFFLINE,
    "srpo, offline, nothing twice": ROOMY | SRPO | OFFLINE,
    "leap_align": EXACT | LEAPS,
    "leap_align, nothing twice": ROOMY | LEAPS,
    "leap_align, nothing twice, step by step": ROOMY | LEAPS | {"stepwise_backward": True},
    "adjoint_matching, last 4 steps": EXACT | ADJOINT | {"method_kwargs": {"adjoint_steps": 4}},
    "adjoint_matching, last 4 steps, nothing twice": ROOMY | ADJOINT | {"method_kwargs": {"adjoint_steps": 4}},
    "adjoint_matching, nothing twice": ROOMY | ADJOINT,
    # Scored by 8 blocks and a head, not decoded. Not after other arms: their reward stays loaded.
    "prfl, last step": EXACT | PRFL,
    "prfl, last step, nothing twice": ROOMY | PRFL,
    # Not exact.
    "4-bit base": EXACT | {"base_bits": 4},
    "half the steps": FAST | {"prefix_steps": 12},
    "rollouts used 4 times": FAST | {"rollout_reuse": 4},
    "gradient of the text branch": FAST | {"guidance_gradient": "none"},
    "a quarter of the steps": FAST | {"prefix_steps": 6},
    # Several of them together, with FlashAttention-3 in no-grad steps.
    f"{TOGETHER}{FA3}": CHEAP | {"guidance_together": True},
    f"{TOGETHER}, gradient of the text branch{FA3}": CHEAP | {"guidance_gradient": "none"},
    f"{TOGETHER.replace('4', '6')}{FA3}": CHEAP | {"guidance_together": True, "rollout_reuse": 6},
    f"{TOGETHER.replace('4', '8')}{FA3}": CHEAP | {"guidance_together": True, "rollout_reuse": 8},
}
CAPS_GIB = {"24 GiB": 24}  # the device's memory is limited to this


class StockWan(diffusers.WanTransformer3DModel):
    """diffusers' Wan, called as the generators here are."""

    def forward(self, latents, text, pooled, timestep, joint_attention_kwargs=None, return_dict=True):
        """Return the velocity. pooled: not read."""
        return super().forward(latents, timestep, text, return_dict=return_dict)


@dataclass(frozen=True)
class Size:
    """The parts' sizes; {} is ContentV-8B's and Wan2.1's own. classes: ours, and diffusers'."""

    transformer: dict
    vae: dict
    dtype: torch.dtype
    text_tokens: int
    height: int
    width: int
    classes: tuple[type, type] = (SD3Transformer3DModel, SD3Transformer3DModel)


WAN = (WanTransformer3DModel, StockWan)
SIZES = {
    "full": Size({}, {}, torch.bfloat16, 333, 432, 768),
    "tiny": Size(
        {
            "num_layers": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
        },
        {"base_dim": 8, "num_res_blocks": 1},
        torch.float32,
        6,
        32,
        48,
    ),
    "wan 1.3B": Size(SMALL_WAN, {}, torch.bfloat16, 512, 480, 832, WAN),
    "wan 14B": Size(LARGE_WAN, {}, torch.bfloat16, 512, 480, 832, WAN),
    "wan tiny": Size(
        {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "ffn_dim": 48},
        {"base_dim": 8, "num_res_blocks": 1},
        torch.float32,
        6,
        32,
        48,
        WAN,
    ),
}


class Rig:
    """A model with random weights, set up as one arm's settings say, and what it is given.

    The weights depend on the device and the size alone: equal for all arms. layout: of several
    processes. settings: instead of the arm's own.
    """

    def __init__(
        self,
        arm: str,
        size: Size,
        frames: int,
        steps: int,
        scored: int,
        device: torch.device,
        layout: Layout | None = None,
        settings: dict | None = None,
    ):
        self.arm, self.size, self.device, self.layout = arm, size, device, layout
        common = {"num_frames": frames, "num_inference_steps": steps, "guidance_scale": 6.0, "lora_rank": 32}
        self.args = args = RewardGradientConfig(**common | (SETTINGS[arm] if settings is None else settings))
        self.options = read_options(args.method, args.method_kwargs)
        self.by_hand = arm in (PEERS, STOCK)  # as diffusers runs it
        vae_dtype = getattr(torch, args.vae_dtype)
        self.vae = random_vae(size, device).to(vae_dtype)
        self.transformer = random_transformer(size, device, self.by_hand)
        self.masters = self._adapt()
        self.optimizer = make_optimizer(self.masters.vector, args)
        self.fields = None if self.by_hand else self.make_fields(layout)
        caches = HostMemory(device) if args.decode_caches == "host" else args.decode_caches
        chunk, checkpoint = args.decode_chunk, args.decode_checkpoint
        self.decode = Decoder(self.vae, scored, args.decode_window, args.seed, chunk, checkpoint, caches)
        self.sigmas = flow_sigmas(FlowMatchEulerDiscreteScheduler(), steps, device)
        channels = self.transformer.config.in_channels
        self.shape = (1, channels, 1 + (frames - 1) // 4, size.height // 8, size.width // 8)
        self.cond = self._conditioning()

    def make_fields(self, layout: Layout | None) -> VelocityFields:
        """Return the velocity fields of the current settings."""
        args, group = self.args, layout and layout.guidance_group
        how = Guidance.from_settings(args), args.stepwise_backward, group
        return VelocityFields(self.transformer, self.masters, *how)

    def noise(self, purpose: str) -> torch.Tensor:
        """(1, C, T, H, W), float32: always the same for the same purpose."""
        return torch.randn(self.shape, generator=generator("bench", purpose)).to(self.device)

    def _adapt(self) -> MasterWeights:
        add_adapter(self.transformer, lora_config(self.args), seed=0)
        self.chosen = {}
        if self.by_hand:
            use_stock_norms(self.transformer)
            if self.arm == PEERS:
                self.transformer.enable_gradient_checkpointing()
        else:
            group = self.layout and self.layout.sequence_group
            self.chosen = set_up_blocks(self.transformer, ExecutionOptions.from_settings(self.args), self.device, group)
            self._use_flash_attention_3(FA3 in self.arm)
        masters = MasterWeights(self.transformer)
        for name, piece in masters.named(masters.vector).items():
            if "lora_B" in name:  # zero at the start, where A has no gradient
                piece.copy_(0.02 * torch.randn(piece.shape, generator=generator("bench", name)))
        masters.write()
        return masters

    def _use_flash_attention_3(self, asked: bool) -> None:
        """In those arms alone that have it in their name, whatever is installed."""
        runner = self.transformer.run_block
        if not asked and isinstance(runner, BlockRunner):
            runner.inference_attention = runner.attention
            self.chosen["attention_kernel"] = self.chosen["attention_kernel"].split("; ")[0]
        elif asked and runner.inference_attention is runner.attention:
            raise ValueError("FlashAttention-3 is not installed, or not faster here")

    def _conditioning(self) -> Conditioning:
        config, draw = self.transformer.config, generator("bench", "text")
        widths = (
            (config.text_dim, 0)
            if self.size.classes == WAN
            else (config.joint_attention_dim, config.pooled_projection_dim)
        )
        shapes = [(1, self.size.text_tokens, widths[0]), (1, widths[1])] * 2
        return Conditioning(*(torch.randn(shape, generator=draw).to(self.device, self.size.dtype) for shape in shapes))


def random_transformer(size: Size, device: torch.device, stock: bool = False) -> torch.nn.Module:
    """Return a transformer of a size with random weights. stock: as diffusers runs it."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with torch.device(device):
            model = size.classes[stock](**size.transformer)
    finally:
        torch.set_default_dtype(default)
    for name, p in model.named_parameters():
        if any(part in name for part in model._keep_in_fp32_modules or ()):  # as from_pretrained keeps them
            p.data = p.data.float()
    return model


@torch.no_grad()
def random_vae(size: Size, device: torch.device) -> AutoencoderKLWan:
    """Whose pixels have a spread of 0.1 around 0, in a range of -1 to 1: none is clamped."""
    torch.manual_seed(1)
    with torch.device(device):
        vae = AutoencoderKLWan(**size.vae).eval().requires_grad_(False)
    probe = torch.randn(1, vae.config.z_dim, 1, size.height // 8, size.width // 8, generator=generator("bench", "vae"))
    pixels = decode_unclamped(vae, unnormalise(vae, probe.to(device)))
    layer = vae.decoder.conv_out
    layer.weight *= 0.1 / pixels.std()
    layer.bias.zero_()
    return vae


def use_stock_norms(transformer: torch.nn.Module) -> None:
    """Set the norms of queries and keys as the published transformer has them."""
    for module in transformer.modules():
        if isinstance(module, QueryKeyNorm):
            module.__class__ = RMSNorm


class TinyReward(torch.nn.Module):
    """Stands for a reward model where the whole run is tiny: one convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.conv = torch.nn.Conv2d(3, 8, 5, stride=2).requires_grad_(False)

    def forward(self, video_BCTHW, prompts, **info):
        """Return one score a video."""
        frames = video_BCTHW.transpose(1, 2).flatten(0, 1)
        return torch.tanh(self.conv(frames)).square().unflatten(0, (len(video_BCTHW), -1)).mean((1, 2, 3, 4))


def make_latent_reward(rig: Rig) -> LatentReward:
    """Return a reward of latents on the first blocks of the rig's size, with random weights.

    Its blocks are recomputed if those of the rig are.
    """
    config, args = rig.transformer.config, rig.args
    config = dict(config) | {"_class_name": type(rig.transformer).__name__}
    torch.manual_seed(2)
    with torch.device(rig.device):
        blocks = min(PUBLISHED_BLOCKS, config["num_layers"] - 1)
        return LatentReward.random_init(config, blocks, rig.size.dtype, args.gradient_checkpointing)


def make_reward(size_name: str, scored: int, device: torch.device):
    """HPS v2.1 of full size with random weights, on at most 8 of the scored frames."""
    if "tiny" in size_name:
        return TinyReward().to(device)
    from rewards.models.hps import HpsV21

    torch.manual_seed(2)
    with torch.device(device):
        return HpsV21.random_init(frames="all", num_frames=min(8, scored)).to(device)


def floor_seconds(rig: Rig, phase: str) -> float | None:
    """Return the least seconds of a phase's matrix products and attention on an H200.

    Attention is kept, the rest of a block recomputed.

    Linear layers of the blocks and attention; a frozen layer's backward pass costs as much as its
    forward pass.
    """
    config, (_, _, T, H, W) = rig.transformer.config, rig.shape
    width, blocks = config.num_attention_heads * config.attention_head_dim, config.num_layers
    tokens = T * (H // config.patch_size) * (W // config.patch_size) + rig.size.text_tokens
    linear, attention = 2 * 12 * width**2 * blocks * tokens, 4 * width * blocks * tokens**2
    forward = linear / MATRIX + attention / ATTENTION_FORWARD
    return {
        "sampling": 2 * forward,
        "segment": forward + 2 * linear / MATRIX + 2.5 * attention / ATTENTION_BACKWARD,
    }.get(phase)
