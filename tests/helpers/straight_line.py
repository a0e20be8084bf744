"""ContentV's transformer and sampler in plain torch, in the order of the arithmetic.

Written from the geometry of the published model. Nothing is shared with the package or diffusers.
Weights come as a state dict, sizes as a dict of the transformer's config.
"""

import math

import torch
import torch.nn.functional as F


def expected_shapes(sizes: dict) -> dict[str, tuple[int, ...]]:
    """Every key of the published checkpoint with its shape."""
    width, head = sizes["num_attention_heads"] * sizes["attention_head_dim"], sizes["attention_head_dim"]
    p, c_in, c_out = sizes["patch_size"], sizes["in_channels"], sizes["out_channels"]
    shapes = {"pos_embed.proj.weight": (width, c_in, p, p), "pos_embed.proj.bias": (width,)}

    def linear(name, rows, columns):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    linear("time_text_embed.timestep_embedder.linear_1", width, 256)
    linear("time_text_embed.timestep_embedder.linear_2", width, width)
    linear("time_text_embed.text_embedder.linear_1", width, sizes["pooled_projection_dim"])
    linear("time_text_embed.text_embedder.linear_2", width, width)
    linear("context_embedder", width, sizes["joint_attention_dim"])
    for i in range(sizes["num_layers"]):
        block, is_last = f"transformer_blocks.{i}", i == sizes["num_layers"] - 1
        linear(f"{block}.norm1.linear", 6 * width, width)
        linear(f"{block}.norm1_context.linear", (2 if is_last else 6) * width, width)
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"):
            linear(f"{block}.attn.{name}", width, width)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            shapes[f"{block}.attn.{name}.weight"] = (head,)
        linear(f"{block}.ff.net.0.proj", 4 * width, width)
        linear(f"{block}.ff.net.2", width, 4 * width)
        if not is_last:
            linear(f"{block}.attn.to_add_out", width, width)
            linear(f"{block}.ff_context.net.0.proj", 4 * width, width)
            linear(f"{block}.ff_context.net.2", width, 4 * width)
    linear("norm_out.linear", 2 * width, width)
    linear("proj_out", p * p * c_out, width)
    return shapes


def transformer_forward(w: dict, sizes: dict, latents, text, pooled, timestep):
    """Velocity (B, C, T, H, W). `w` is the state dict, timestep is (B,) in [0, 1000]."""
    B, C, T, H, W = latents.shape
    p, c_out = sizes["patch_size"], sizes["out_channels"]
    rows, columns = H // p, W // p

    # Patches of p x p pixels of all channels, through the convolution as a matrix; plus positions.
    patches = latents.reshape(B, C, T, rows, p, columns, p).permute(0, 2, 3, 5, 1, 4, 6).reshape(B, -1, C * p * p)
    kernel = w["pos_embed.proj.weight"].reshape(-1, C * p * p)
    video = patches @ kernel.T + w["pos_embed.proj.bias"] + position_table(T, rows, columns, len(kernel)).to(latents)
    text = linear(w, "context_embedder", text)
    condition = condition_vector(w, pooled, timestep)
    for i in range(sizes["num_layers"]):
        is_last = i == sizes["num_layers"] - 1
        video, text = block(w, f"transformer_blocks.{i}", is_last, sizes["num_attention_heads"], video, text, condition)

    scale, shift = linear(w, "norm_out.linear", condition).chunk(2, -1)
    patches = linear(w, "proj_out", normalise(video) * (1 + scale) + shift)
    return patches.reshape(B, T, rows, columns, p, p, c_out).permute(0, 6, 1, 2, 4, 3, 5).reshape(B, c_out, T, H, W)


def condition_vector(w, pooled, timestep):
    """256 cosines and sines of the timestep, and the pooled text, each through two layers."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = timestep[:, None].float() * frequencies
    time = torch.cat([angles.cos(), angles.sin()], -1).to(pooled)
    embedder = "time_text_embed.timestep_embedder"
    condition = linear(w, f"{embedder}.linear_2", F.silu(linear(w, f"{embedder}.linear_1", time)))
    embedder = "time_text_embed.text_embedder"
    condition = condition + linear(w, f"{embedder}.linear_2", F.silu(linear(w, f"{embedder}.linear_1", pooled)))
    return F.silu(condition)[:, None]


def block(w, name, is_last, heads, video, text, condition):
    """One layer. The last one's text goes into the attention and is done with."""
    shift, scale, gate, ff_shift, ff_scale, ff_gate = linear(w, f"{name}.norm1.linear", condition).chunk(6, -1)
    v = normalise(video) * (1 + scale) + shift
    of_text = linear(w, f"{name}.norm1_context.linear", condition)
    if is_last:
        t_scale, t_shift = of_text.chunk(2, -1)
    else:
        t_shift, t_scale, t_gate, t_ff_shift, t_ff_scale, t_ff_gate = of_text.chunk(6, -1)
    t = normalise(text) * (1 + t_scale) + t_shift
    v_mixed, t_mixed = attend(w, f"{name}.attn", heads, v, t)

    video = video + gate * linear(w, f"{name}.attn.to_out.0", v_mixed)
    video = video + ff_gate * feed_forward(w, f"{name}.ff", normalise(video) * (1 + ff_scale) + ff_shift)
    if not is_last:
        text = text + t_gate * linear(w, f"{name}.attn.to_add_out", t_mixed)
        t = normalise(text) * (1 + t_ff_scale) + t_ff_shift
        text = text + t_ff_gate * feed_forward(w, f"{name}.ff_context", t)
    return video, text


def attend(w, name, heads, v, t):
    """Attention among video and text tokens together, each with projections of its own."""

    def split_heads(layer, x, norm=None):
        x = linear(w, f"{name}.{layer}", x)
        x = x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)
        if norm is not None:
            x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.{norm}.weight"]
        return x

    q = torch.cat([split_heads("to_q", v, "norm_q"), split_heads("add_q_proj", t, "norm_added_q")], 2)
    k = torch.cat([split_heads("to_k", v, "norm_k"), split_heads("add_k_proj", t, "norm_added_k")], 2)
    values = torch.cat([split_heads("to_v", v), split_heads("add_v_proj", t)], 2)
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
    mixed = (weights @ values).transpose(1, 2).flatten(2)
    return mixed[:, : v.shape[1]], mixed[:, v.shape[1] :]


def feed_forward(w, name, x):
    x = linear(w, f"{name}.net.0.proj", x)
    gelu = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return linear(w, f"{name}.net.2", gelu)


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def normalise(x):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-6)


def position_table(frames: int, rows: int, columns: int, width: int) -> torch.Tensor:
    """(frames * rows * columns, width) in float64: 1/4 for time, 3/8 each for column and row.

    Rows and columns are counted in half patches (interpolation scale 0.5).
    """

    def waves(positions, size):
        angles = positions[:, None] * 10000.0 ** (-torch.arange(size // 2, dtype=torch.float64) / (size // 2))
        return torch.cat([angles.sin(), angles.cos()], -1)

    t, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (frames, rows, columns)), indexing="ij")
    parts = [(t, width // 4), (x / 0.5, 3 * width // 8), (y / 0.5, 3 * width // 8)]
    return torch.cat([waves(positions.flatten(), size) for positions, size in parts], -1)


def guided_sample(w, sizes, noise, cond, num_steps: int, guidance: float, shift: float):
    """Euler steps from `noise` to data. `cond`: text, pooled, negative text, negative pooled."""
    text, pooled, negative_text, negative_pooled = cond
    x = noise
    sigmas = [1 - i / num_steps for i in range(num_steps + 1)]
    sigmas = [shift * s / (1 + (shift - 1) * s) for s in sigmas]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        timestep = torch.full((len(x),), 1000 * sigma)
        v_text = transformer_forward(w, sizes, x, text, pooled, timestep)
        v_negative = transformer_forward(w, sizes, x, negative_text, negative_pooled, timestep)
        x = x + (sigma_next - sigma) * (v_negative + guidance * (v_text - v_negative))
    return x
