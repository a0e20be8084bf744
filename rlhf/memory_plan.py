"""The memory that one optimizer step holds on the device, worked out by running its parts on tensors without storage.

What autograd keeps is counted by its own hooks, with the sizes of the real model, in a second. Left out: gradients in
flight, the workspaces of kernels, rewards and the text encoders. Shape legend: B batch, C channels, T latent frames,
H W latent height and width, N video tokens, L text tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from rlhf.config import RewardGradientConfig
from rlhf.contentv.blocks import after_attention, before_attention
from rlhf.contentv.transformer import SD3Transformer3DModel
from rlhf.contentv.wan_decoder import decode_video
from rlhf.layout import started_processes
from rlhf.lora import add_adapter, lora_config
from rlhf.recompute import as_leaves
from rlhf.speed import Speed

CLIP_TOKENS = 77  # of the text, besides those of T5


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device, each of them for one device and a batch of `per_device_train_batch_size` videos."""

    transformer: int  # frozen weights
    branch: int  # what one guidance branch of one step keeps for its backward pass
    block: int  # and what one recomputed block does on top of it, while it is passed
    decoder: int  # what the decoder keeps, recomputed chunk included
    window: int  # what all steps with gradient keep while the decoder has its backward pass

    @property
    def most(self) -> int:
        """At the worse of the two moments: in the decoder, or in a block of the first branch that is passed."""
        return self.transformer + max(self.window + self.decoder, max(self.window, self.branch) + self.block)


def plan_memory(args: RewardGradientConfig, card: dict[str, dict], frames: int, bytes_each: int) -> MemoryPlan:
    """args has all sampling keys set; frames: leading frames that are decoded; bytes_each: of a weight of the base."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[bytes_each]
    speed, (blocks, weights) = Speed.of(args), _blocks(args, card, dtype)
    branch, of_block = _branch(speed, blocks)
    guided = 2 if args.guidance_scale > 1 and args.guidance_gradient == "full" else 1
    guided //= args.guidance_parallel
    together = guided if args.guidance_together else 1
    graphs = guided * args.num_grad_steps
    window = 0 if args.stepwise_backward else branch * graphs
    decoder = _decoder(args, card, frames)
    weights = _resident(speed, weights, bytes_each)
    return MemoryPlan(weights, together * branch, together * of_block, decoder, window)


# ---------------------------------------------------------------------------------------------- the transformer


@dataclass(frozen=True)
class _Block:
    """Bytes of a block's inputs and its attention's result, and what autograd keeps of all of it and of two parts."""

    inputs: int
    result: int
    whole: int
    until_attention: int
    after: int


class _Attention(torch.autograd.Function):
    """Keeps what attention kernels keep: query, key, value, result, and a log-sum-exp for each row."""

    @staticmethod
    def forward(ctx, query, key, value):
        result = torch.empty_like(value)
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result


def _blocks(args, card, dtype) -> tuple[list[_Block], tuple[int, int, int]]:
    """Every block, and how many frozen weights: of all blocks, of the largest, and of the rest."""
    with torch.device("meta"):
        transformer = nn.Module.to(SD3Transformer3DModel.from_config(card["transformer"]), dtype)
    add_adapter(transformer, lora_config(args), args.seed, args.train_blocks)
    weights = [sum(p.numel() for p in m.parameters() if not p.requires_grad) for m in transformer.transformer_blocks]
    rest = sum(p.numel() for p in transformer.parameters() if not p.requires_grad) - sum(weights)
    B, _, T, H, W = _latent_shape(args, card)
    width, patch = transformer.inner_dim, transformer.config.patch_size
    video_tokens = -(-T * (H // patch) * (W // patch) // args.sequence_parallel)
    tokens = video_tokens, CLIP_TOKENS + args.max_sequence_length
    shapes = [(B, tokens[0], width), (B, tokens[1], width), (B, width)]
    inputs = [torch.empty(shape, device="meta", dtype=dtype) for shape in shapes]
    inputs = as_leaves(inputs, (True, True, False))  # the time's embedding is the same for every adapter
    first, last = (_block(transformer, i, *inputs) for i in (0, -1))
    return [first] * (len(weights) - 1) + [last], (sum(weights), max(weights), rest)


def _block(transformer, number: int, video, text, temb) -> _Block:
    block = transformer.transformer_blocks[number]

    def until_attention():
        query, key, value, *gates = before_attention(block, video, text, temb)
        return _Attention.apply(query, key, value), *gates

    def whole():
        result, *gates = until_attention()
        return after_attention(block, result, video, text, *gates)

    (result, *gates), until = _kept(transformer, until_attention)
    leaves = as_leaves([result, *gates], (x.requires_grad for x in (result, *gates)))
    _, after = _kept(transformer, lambda: after_attention(block, leaves[0], video, text, *leaves[1:]))
    rows = 4 * result[..., 0].numel()
    return _Block(_bytes(video) + _bytes(text), _bytes(result) + rows, _kept(transformer, whole)[1], until, after)


def _branch(speed: Speed, blocks: list[_Block]) -> tuple[int, int]:
    """What a branch keeps, and what is there besides while one block is passed."""
    if speed.recompute == "nothing":
        return sum(block.whole for block in blocks), 0
    kept = [block.inputs + (block.result if speed.keep_attention else 0) for block in blocks]
    waiting = 2 * max(kept) if speed.offload_activations else sum(kept)
    if speed.recompute == "block":
        return waiting, max(block.whole for block in blocks)
    return waiting, max(max(block.after, block.until_attention) - block.result for block in blocks)  # it waits already


def _resident(speed: Speed, weights: tuple[int, int, int], bytes_each: int) -> int:
    of_blocks, of_one, rest = weights
    if speed.stream_weights:
        return bytes_each * (2 * of_one + rest)
    if speed.shard_base:  # two blocks at a time are whole
        return bytes_each * (of_blocks // started_processes() + 2 * of_one + rest)
    return bytes_each * rest + of_blocks * (speed.base_bits or 8 * bytes_each) // 8


# --------------------------------------------------------------------------------------------------- the decoder


def _decoder(args, card, frames: int) -> int:
    with torch.device("meta"):
        vae = nn.Module.to(AutoencoderKLWan.from_config(card["vae"]), getattr(torch, args.vae_dtype))
    vae.requires_grad_(False).eval()
    latents = torch.empty(_latent_shape(args, card), device="meta").requires_grad_()
    chunk = args.decode_chunk
    if not args.decode_checkpoint:
        return _kept(vae, lambda: decode_video(vae, latents, frames, chunk))[1]
    per_latent = 2 ** sum(vae.config.temperal_downsample)
    video, waiting = _kept(vae, lambda: decode_video(vae, latents, frames, chunk, True, 0, _on_device(args)))
    two = min(frames, 1 + per_latent * (2 * chunk - 1))  # the second chunk has caches from the first
    of_two = _kept(vae, lambda: decode_video(vae, latents, two, chunk))[1]
    of_one = _kept(vae, lambda: decode_video(vae, latents, min(frames, 1 + per_latent * (chunk - 1)), chunk))[1]
    return _bytes(video) + (0 if args.decode_caches == "host" else waiting) + max(of_one, of_two - of_one)


def _on_device(args) -> str:
    return "keep" if args.decode_caches == "host" else args.decode_caches


def _latent_shape(args, card) -> tuple[int, ...]:
    every, down = 2 ** sum(card["vae"]["temperal_downsample"]), 2 ** len(card["vae"]["temperal_downsample"])
    frames = 1 + (args.num_frames - 1) // every
    return (
        args.per_device_train_batch_size,
        card["transformer"]["in_channels"],
        frames,
        args.height // down,
        args.width // down,
    )


# ------------------------------------------------------------------------------------------------------ counting


def _kept(module: nn.Module, function: Callable):
    """What the function returns, and the bytes that its graph keeps besides the module's parameters."""
    own, sizes = {p.untyped_storage()._cdata for p in module.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        held.append(tensor)  # or its address would be used again
        return tensor

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return result, sum(sizes.values())


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
