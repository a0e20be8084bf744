"""How a joint attention block of the transformer is run when memory or speed matter: the same modules in three parts.

diffusers' block is one function. Here what comes before the attention, the attention and what follows are apart, so
that its kernel can be chosen, the two others compiled, and the block recomputed in the backward pass without computing
the attention again. Shape legend: B batch, N video tokens, L text tokens, D width, H heads, W width of a head.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from rlhf.attention import Attention
from rlhf.contentv.shards import Shards
from rlhf.host_memory import Group, HostMemory
from rlhf.recompute import as_leaves, gradients, kept_in, recomputed

RECOMPUTE = ("nothing", "block", "all but attention")


class BlockRunner:
    """Runs a block: (block, video_BND, text_BLD, temb_BD) -> text, video, as the block itself returns them.

    Args:
        attention: (query, key, value) -> attended, (B, H, N + L, W) each.
        recompute: what the backward pass computes again: "nothing"; the whole "block", of which only the inputs are
            kept; or "all but attention", whose result is kept too, one more tensor of the inputs' size.
        host: where recomputed blocks keep inputs and attention until the backward pass; None: on the device.
        compiler: such as `torch.compile`, for the parts before and after the attention. Of all blocks but the last,
            which has other code: compiling it too would take as long as all the others.
        fetch: called with a block before its weights are used.
        attention_without_gradient: as attention; None: the same.
    """

    def __init__(
        self,
        attention: Attention = F.scaled_dot_product_attention,
        recompute: str = "nothing",
        host: HostMemory | None = None,
        compiler: Callable | None = None,
        fetch: Callable[[torch.nn.Module], None] | None = None,
        attention_without_gradient: Attention | None = None,
    ):
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute={recompute!r}, expected one of {', '.join(RECOMPUTE)}; choose one of these")
        self.attention, self.recompute, self.host, self.fetch = attention, recompute, host, fetch
        self.attention_without_gradient = attention_without_gradient or attention
        self.shards: Shards | None = None  # of tokens over processes; the attention then has a part of the heads
        compiler = compiler or (lambda function: function)
        self._before, self._after = compiler(before_attention), compiler(after_attention)

    def over(self, shards: Shards) -> "BlockRunner":
        """This runner, for blocks of which each process has a part of the tokens."""
        runner = copy.copy(self)
        runner.shards = shards
        return runner

    def __call__(self, block, video, text, temb):
        if not torch.is_grad_enabled():
            return self.whole(block, video, text, temb, self.attention_without_gradient)
        if self.recompute == "nothing":
            return self.whole(block, video, text, temb)
        parameters = [p for p in block.parameters() if p.requires_grad]
        place = self.host.group() if self.host else None
        if self.recompute == "block":
            return recomputed(partial(self.whole, block), video, text, temb, parameters=parameters, place=place)
        if not any(x.requires_grad for x in (video, text, temb, *parameters)):
            return self.whole(block, video, text, temb)
        with kept_in(place):
            return _KeepAttention.apply(self, block, place, video, text, temb, *parameters)

    def whole(self, block, video, text, temb, attention: Attention | None = None) -> tuple[torch.Tensor | None, ...]:
        """The block at once; attention: in place of the runner's own."""
        query, key, value, *gates = self.before(block, video, text, temb)
        attended = (attention or self.attention)(query, key, value)
        return self.after(block, attended, video, text, *gates)

    def before(self, block, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`before_attention`; of divided tokens, all of them with this process's heads."""
        if self.fetch:
            self.fetch(block)
        found = (before_attention if block.context_pre_only else self._before)(block, *inputs)
        return found if self.shards is None else (*self.shards.by_heads(*found[:3]), *found[3:])

    def after(self, block, attended: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """`after_attention`, of what came out of the attention over the result of `before`."""
        if self.fetch:
            self.fetch(block)
        attended = attended if self.shards is None else self.shards.by_tokens(attended)
        return (after_attention if block.context_pre_only else self._after)(block, attended, *inputs)


def before_attention(
    block, video_BND: torch.Tensor, text_BLD: torch.Tensor, temb_BD: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """query, key, value (B, H, N + L, W), then what `after_attention` takes of the modulation, (B, D) each."""
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
    block, attended_BHNW: torch.Tensor, video_BND: torch.Tensor, text_BLD: torch.Tensor, *gates_BD: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """text, None after the last block, and video, (B, L, D) and (B, N, D)."""
    attn, gates_B1D = block.attn, [gate.unsqueeze(1) for gate in gates_BD]
    attended = attended_BHNW.transpose(1, 2).flatten(2)
    attended, text_attended = attended.split([video_BND.shape[1], text_BLD.shape[1]], 1)
    attended = attn.to_out[1](attn.to_out[0](attended))
    video = _add(video_BND, attended, *gates_B1D[:4], norm=block.norm2, feed_forward=block.ff)
    if block.context_pre_only:
        return None, video
    text_attended = attn.to_add_out(text_attended)
    text = _add(text_BLD, text_attended, *gates_B1D[4:], norm=block.norm2_context, feed_forward=block.ff_context)
    return text, video


def _add(x, attended, gate_attention, shift, scale, gate_feed_forward, norm, feed_forward):
    x = x + gate_attention * attended
    return x + gate_feed_forward * feed_forward(norm(x) * (1 + scale) + shift)


class _KeepAttention(torch.autograd.Function):
    """A block that keeps its inputs and the attention's result, and runs the rest again in the backward pass.

    The attention runs once, with a graph of its own that keeps its result and forgets query, key and value; these are
    computed again and put back when its backward pass asks for them. So any kernel will do, and what a kernel keeps
    besides (cuDNN and flash attention: a log-sum-exp for each row) stays.
    """

    @staticmethod
    def forward(ctx, runner, block, place, video, text, temb, *parameters):
        ctx.set_materialize_grads(False)
        ctx.runner, ctx.block, ctx.parameters = runner, block, parameters
        query, key, value, *gates = runner.before(block, video, text, temb)
        ctx.attention = _Forgetful(place)
        attended = ctx.attention(runner.attention, query, key, value)
        del query, key, value
        ctx.save_for_backward(video, text, temb, attended, *gates)
        return runner.after(block, attended, video, text, *gates)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        runner, block, parameters = ctx.runner, ctx.block, ctx.parameters
        video, text, temb, attended, *gates = ctx.saved_tensors
        attention, ctx.attention = ctx.attention, None  # what it keeps is freed now, not with the whole graph
        of_video, of_text, of_temb = ctx.needs_input_grad[3:6]
        of_gates = [of_temb or _is_modulation_trained(block)] * len(gates)

        with torch.enable_grad():  # what follows the attention; its graph is gone before the next one is built
            inputs = as_leaves((attended, video, text, *gates), (True, of_video, of_text, *of_gates))
            outputs = runner.after(block, *inputs)
        of_attended, of_video_after, of_text_after, *rest = gradients(outputs, (*inputs, *parameters), grads)
        grads_of_gates, of_parameters_after = rest[: len(gates)], rest[len(gates) :]
        del inputs, outputs

        with torch.enable_grad():
            inputs = as_leaves((video, text, temb), (of_video, of_text, of_temb))
            outputs = runner.before(block, *inputs)
        of_query_key_value = attention.gradients((*outputs[:3], attended), of_attended)
        found = gradients(outputs, (*inputs, *parameters), (*of_query_key_value, *grads_of_gates))
        both = zip(found, (of_video_after, of_text_after, None, *of_parameters_after), strict=True)
        return None, None, None, *(_sum(a, b) for a, b in both)


def _is_modulation_trained(block) -> bool:
    return any(p.requires_grad for norm in (block.norm1, block.norm1_context) for p in norm.parameters())


class _Forgetful:
    """Computes attention once, with a graph that forgets query, key, value and result until they are given again.

    The graph refers to the two lists, not to this object, which holds the graph: a circle would outlive its use.
    """

    def __init__(self, place: Group | None):
        self.place, self.kept, self.known = place, [], []

    def __call__(self, attention: Attention, *inputs: torch.Tensor) -> torch.Tensor:
        kept, packed = self.kept, []

        def pack(tensor: torch.Tensor) -> int:
            packed.append(tensor)
            return len(packed) - 1

        self.inputs = as_leaves(inputs, [True] * 3)
        with torch.enable_grad(), saved_tensors_hooks(pack, lambda number: kept[number]()):
            result = attention(*self.inputs)
        self.edge = torch.autograd.graph.get_gradient_edge(result)
        kept += [self._keep(tensor, (*inputs, result)) for tensor in packed]
        packed.clear()
        for x in self.inputs:
            x.data = x.new_empty(0)  # the graph still ends in them
        return result.detach()

    def gradients(self, known: tuple[torch.Tensor, ...], of_result: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Those of query, key and value; known: these three, computed again, and the result."""
        self.known += [x.detach() for x in known]
        return torch.autograd.grad(self.edge, self.inputs, of_result)

    def _keep(self, tensor: torch.Tensor, forgotten: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
        """How to get back a tensor that the attention keeps."""
        known, place = self.known, self.place
        for i, x in enumerate(forgotten):
            if (x.data_ptr(), x.shape, x.stride()) == (tensor.data_ptr(), tensor.shape, tensor.stride()):
                return lambda: known[i]
        if place is None:
            return lambda: tensor
        packed = place.pack(tensor)
        return lambda: place.unpack(packed)


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b
