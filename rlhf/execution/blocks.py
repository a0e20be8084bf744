"""Transformer blocks in three parts, for a choice of kernel, compilation and recomputation.

diffusers' blocks are one function each. Here the same modules run as three: query, key, value and
gates; the attention; and the rest. A `BlockParts` has the first and the last of a block's class.
So the kernel can be chosen, the other two parts compiled, and the block recomputed in the backward
pass without its attention.
Shape legend: B batch, N video tokens, L text tokens, D width, H heads, W width of a head.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from rlhf.execution.attention import Attention
from rlhf.execution.offload import HostMemory, OffloadGroup
from rlhf.execution.recompute import as_leaves, gradient_checkpoint, gradients, offload_saved_tensors
from rlhf.execution.ulysses import SequenceShards

Tensors = tuple[torch.Tensor | None, ...]
RECOMPUTE = ("nothing", "block", "all but attention")


@dataclass(frozen=True)
class BlockParts:
    """The parts of a class of blocks around its attention.

    before: (block, video, text, temb, *constants) -> query, key, value (B, H, tokens, W), and gates
    that are functions of temb. after: (block, attended, video, text, *gates, attention) -> text,
    video; attention: for other attention within it, as in `BlockRunner`. differs: whether a block's
    code differs from that of the others. modulation: the parameters that make the gates of temb.
    """

    before: Callable[..., Tensors]
    after: Callable[..., Tensors]
    differs: Callable[[torch.nn.Module], bool]
    modulation: Callable[[torch.nn.Module], Iterable[torch.nn.Parameter]]


class BlockRunner:
    """A way to run a block: (block, video_BND, text_BLD, temb, *constants) -> text, video.

    Constants are tensors that all blocks share and that carry no gradient, such as rotations.

    Args:
        attention: (query, key, value) -> result, (B, H, N + L, W) each.
        recompute: the part that the backward pass recomputes. "nothing"; "block": only the block's
            inputs are saved; "all but attention": the attention's result is saved too, a tensor of
            the inputs' size.
        host: offloads what recomputed blocks save; None: it stays on the device.
        compiler: such as `torch.compile`, for the parts before and after the attention. It skips
            the last block, whose code differs and would take as long as all the others.
        fetch: called with a block before its weights are used.
        inference_attention: the attention of no-grad steps; None: the same.
        parts: of the blocks' class; None: joint attention.
    """

    def __init__(
        self,
        attention: Attention = F.scaled_dot_product_attention,
        recompute: str = "nothing",
        host: HostMemory | None = None,
        compiler: Callable | None = None,
        fetch: Callable[[torch.nn.Module], None] | None = None,
        inference_attention: Attention | None = None,
        parts: BlockParts | None = None,
    ):
        assert recompute in RECOMPUTE, recompute
        self.attention, self.recompute, self.host, self.fetch = attention, recompute, host, fetch
        self.inference_attention = inference_attention or attention
        self.shards: SequenceShards | None = None  # tokens divided over ranks; each attends with some of the heads
        compiler = compiler or (lambda function: function)
        self.parts = parts or JOINT_BLOCK
        self._before, self._after = compiler(self.parts.before), compiler(self.parts.after)

    def with_shards(self, shards: SequenceShards) -> "BlockRunner":
        """Return this runner for tokens that are divided over ranks."""
        runner = copy.copy(self)
        runner.shards = shards
        return runner

    def __call__(self, block, video, text, temb, *constants):
        """Run a block; the backward pass recomputes its part."""
        # Read from torch, not an argument: a flag that disagreed would put a kernel without a
        # backward pass into a graph.
        if not torch.is_grad_enabled():
            return self.run(block, constants, video, text, temb, attention=self.inference_attention)
        if self.recompute == "nothing":
            return self.run(block, constants, video, text, temb)
        parameters = [p for p in block.parameters() if p.requires_grad]
        offload = self.host.group() if self.host else None
        if self.recompute == "block":
            run = partial(self.run, block, constants)
            return gradient_checkpoint(run, video, text, temb, parameters=parameters, offload=offload)
        if not any(x.requires_grad for x in (video, text, temb, *parameters)):
            return self.run(block, constants, video, text, temb)
        with offload_saved_tensors(offload):
            return _KeepAttention.apply(self, block, constants, offload, video, text, temb, *parameters)

    def run(self, block, constants, video, text, temb, attention: Attention | None = None) -> Tensors:
        """Run the block without recomputation. attention: the kernel; None for the runner's."""
        query, key, value, *gates = self.qkv_and_gates(block, video, text, temb, *constants)
        attended = (attention or self.attention)(query, key, value)
        return self.text_and_video(block, attended, video, text, *gates)

    def qkv_and_gates(self, block, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return query, key and value of all tokens and this rank's heads, and the gates.

        Streamed weights of the block are fetched first. `inputs`: this rank's video tokens, text,
        timestep embedding, and the constants of the model.
        """
        if self.fetch:
            self.fetch(block)
        results = (self.parts.before if self.parts.differs(block) else self._before)(block, *inputs)
        return results if self.shards is None else (*self.shards.to_heads(*results[:3]), *results[3:])

    def text_and_video(self, block, attended: torch.Tensor, *inputs: torch.Tensor) -> Tensors:
        """Return text and this rank's video tokens, given the result of attention for its heads."""
        if self.fetch:
            self.fetch(block)
        attended = attended if self.shards is None else self.shards.to_tokens(attended)
        after = self.parts.after if self.parts.differs(block) else self._after
        return after(block, attended, *inputs, attention=self.attention)


def before_attention(
    block, video_BND: torch.Tensor, text_BLD: torch.Tensor, temb_BD: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return query, key and value (B, H, N + L, W), and gates (B, D) for `after_attention`."""
    video, *gates = block.norm1(video_BND, emb=temb_BD)
    if block.context_pre_only:
        text = block.norm1_context(text_BLD, temb_BD)
    else:
        text, *text_gates = block.norm1_context(text_BLD, emb=temb_BD)
        gates += text_gates
    attn, heads = block.attn, (block.attn.heads, -1)
    query = attn.norm_q(attn.to_q(video).unflatten(-1, heads))
    key = attn.norm_k(attn.to_k(video).unflatten(-1, heads))
    value = attn.to_v(video).unflatten(-1, heads)
    text_query = attn.norm_added_q(attn.add_q_proj(text).unflatten(-1, heads))
    text_key = attn.norm_added_k(attn.add_k_proj(text).unflatten(-1, heads))
    text_value = attn.add_v_proj(text).unflatten(-1, heads)
    pairs = (query, text_query), (key, text_key), (value, text_value)
    return *(torch.cat(pair, 1).transpose(1, 2) for pair in pairs), *gates


def after_attention(
    block,
    attended_BHNW: torch.Tensor,
    video_BND: torch.Tensor,
    text_BLD: torch.Tensor,
    *gates_BD: torch.Tensor,
    attention: Attention,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return text (B, L, D), None for the last block, and video (B, N, D). attention: unused."""
    attn, gates_B1D = block.attn, [gate.unsqueeze(1) for gate in gates_BD]
    attended = attended_BHNW.transpose(1, 2).flatten(2)
    attended, text_attended = attended.split([video_BND.shape[1], text_BLD.shape[1]], 1)
    attended = attn.to_out[1](attn.to_out[0](attended))
    video = _add_gated(video_BND, attended, *gates_B1D[:4], norm=block.norm2, feed_forward=block.ff)
    if block.context_pre_only:
        return None, video
    text_attended = attn.to_add_out(text_attended)
    text_norm, text_feed_forward = block.norm2_context, block.ff_context
    text = _add_gated(text_BLD, text_attended, *gates_B1D[4:], norm=text_norm, feed_forward=text_feed_forward)
    return text, video


def _add_gated(x, attended, gate_attention, shift, scale, gate_feed_forward, norm, feed_forward):
    """Add the attention's result and the feed-forward layer to x, each times its gate."""
    x = x + gate_attention * attended
    return x + gate_feed_forward * feed_forward(norm(x) * (1 + scale) + shift)


def _modulation(block) -> Iterator[torch.nn.Parameter]:
    """Yield the parameters that compute a joint block's shifts, scales and gates."""
    for norm in (block.norm1, block.norm1_context):
        yield from norm.parameters()


JOINT_BLOCK = BlockParts(before_attention, after_attention, lambda block: block.context_pre_only, _modulation)


class _KeepAttention(torch.autograd.Function):
    """A block that saves its inputs and the attention's result.

    The backward pass recomputes the rest. The attention runs once, with a separate graph that keeps
    its result and drops query, key and value. They are recomputed and put back when its backward
    pass asks for them. So any kernel works, and other tensors that a kernel saves (cuDNN and flash
    attention: a log-sum-exp for each row) are kept.
    """

    @staticmethod
    def forward(ctx, runner, block, constants, offload, video, text, temb, *parameters):
        """Run the block; keep only its inputs, its gates and the attention's result and graph."""
        ctx.set_materialize_grads(False)
        ctx.runner, ctx.block, ctx.constants, ctx.parameters = runner, block, constants, parameters
        query, key, value, *gates = runner.qkv_and_gates(block, video, text, temb, *constants)
        ctx.attention = _AttentionGraph(offload)
        attended = ctx.attention(runner.attention, query, key, value)
        del query, key, value
        ctx.save_for_backward(video, text, temb, attended, *gates)
        return runner.text_and_video(block, attended, video, text, *gates)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        """Recompute the block before and after the attention, and return the gradients."""
        runner, block, parameters = ctx.runner, ctx.block, ctx.parameters
        video, text, temb, attended, *gates = ctx.saved_tensors
        attention, ctx.attention = ctx.attention, None  # its tensors are freed now, not with the whole graph
        video_needs, text_needs, temb_needs = ctx.needs_input_grad[4:7]
        is_modulation_trained = any(p.requires_grad for p in runner.parts.modulation(block))
        gates_need = [temb_needs or is_modulation_trained] * len(gates)

        with torch.enable_grad():  # after the attention; this graph is freed before the next one is built
            inputs = as_leaves((attended, video, text, *gates), (True, video_needs, text_needs, *gates_need))
            outputs = runner.text_and_video(block, *inputs)
        attended_grad, video_grad, text_grad, *rest = gradients(outputs, (*inputs, *parameters), grads)
        gate_grads, parameter_grads = rest[: len(gates)], rest[len(gates) :]
        del inputs, outputs

        with torch.enable_grad():  # before the attention
            inputs = as_leaves((video, text, temb), (video_needs, text_needs, temb_needs))
            outputs = runner.qkv_and_gates(block, *inputs, *ctx.constants)
        qkv_grads = attention.gradients((*outputs[:3], attended), attended_grad)
        grads_before = gradients(outputs, (*inputs, *parameters), (*qkv_grads, *gate_grads))
        both = zip(grads_before, (video_grad, text_grad, None, *parameter_grads), strict=True)
        return None, None, None, None, *(_sum(a, b) for a, b in both)


class _AttentionGraph:
    """An attention call whose graph drops query, key, value and result until they are restored.

    The graph refers to the two lists, not to this object, which holds the graph: a reference cycle
    would outlive its use.
    """

    def __init__(self, offload: OffloadGroup | None):
        self.offload, self.getters, self.restored = offload, [], []

    def __call__(self, attention: Attention, *qkv: torch.Tensor) -> torch.Tensor:
        getters, saved = self.getters, []

        def pack(tensor: torch.Tensor) -> int:
            saved.append(tensor)
            return len(saved) - 1

        self.inputs = as_leaves(qkv, [True] * 3)
        with torch.enable_grad(), saved_tensors_hooks(pack, lambda index: getters[index]()):
            result = attention(*self.inputs)
        self.edge = torch.autograd.graph.get_gradient_edge(result)
        getters += [self._getter(tensor, (*qkv, result)) for tensor in saved]
        saved.clear()
        for x in self.inputs:
            x.data = x.new_empty(0)  # the graph still ends in them
        return result.detach()

    def gradients(self, restored: tuple[torch.Tensor, ...], grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradients of query, key and value, given that of the result.

        restored: query, key and value, recomputed, and the result.
        """
        self.restored += [x.detach() for x in restored]
        return torch.autograd.grad(self.edge, self.inputs, grad)

    def _getter(self, tensor: torch.Tensor, dropped: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
        """Return a function that returns a tensor saved by the attention."""
        restored, offload = self.restored, self.offload
        for i, x in enumerate(dropped):
            if (x.data_ptr(), x.shape, x.stride()) == (tensor.data_ptr(), tensor.shape, tensor.stride()):
                return lambda: restored[i]
        if offload is None:
            return lambda: tensor
        packed = offload.pack(tensor)
        return lambda: offload.unpack(packed)


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    """Return a + b, where None is zero."""
    return b if a is None else a if b is None else a + b
