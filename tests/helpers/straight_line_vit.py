"""The transformers of image rewards once more, in plain torch, to compare against.

Written from the papers and the published layouts; nothing is shared with the package or with
transformers. Weights are a dict with the published names; `part` takes those under one prefix.
"""

import torch
import torch.nn.functional as F


def part(weights: dict, prefix: str) -> dict:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def affine(w: dict, name: str, x):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def norm(w: dict, name: str, x, eps):
    x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + eps)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(q, k, v, heads, keep=None):
    """Queries (B, N, heads * D); keys, values of as many heads or one; keep: (.., N or 1, M)."""
    out = []
    for i in range(heads):
        mine = slice(i * q.shape[-1] // heads, (i + 1) * q.shape[-1] // heads)
        theirs = mine if k.shape[-1] == q.shape[-1] else slice(None)
        logits = q[..., mine] @ k[..., theirs].mT / (q.shape[-1] // heads) ** 0.5
        if keep is not None:
            logits = logits.masked_fill(~keep, float("-inf"))
        out.append(logits.softmax(-1) @ v[..., theirs])
    return torch.cat(out, -1)


def patches(w: dict, name: str, pixels):
    """(B, patches, width): each square of pixels times the kernel, row by row."""
    kernel, size = w[f"{name}.weight"], w[f"{name}.weight"].shape[-1]
    squares = pixels.unfold(2, size, size).unfold(3, size, size)  # (B, C, rows, columns, size, size)
    x = torch.einsum("bchwij,dcij->bhwd", squares, kernel).flatten(1, 2)
    return x + w[f"{name}.bias"] if f"{name}.bias" in w else x


def layer(w: dict, x, heads, names: dict, eps, keep=None, activation=F.gelu):
    """Pre-norm attention and feed-forward; names maps q, .., fc2 to the published names."""
    h = norm(w, names["norm1"], x, eps)
    q, k, v = (affine(w, names[part], h) for part in "qkv")
    x = x + affine(w, names["out"], attention(q, k, v, heads, keep))
    h = norm(w, names["norm2"], x, eps)
    return x + affine(w, names["fc2"], activation(affine(w, names["fc1"], h)))


CLIP_NAMES = {letter: f"self_attn.{letter}_proj" for letter in "qkv"}
CLIP_NAMES |= {"out": "self_attn.out_proj", "norm1": "layer_norm1", "norm2": "layer_norm2"}
CLIP_NAMES |= {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def clip_layers(w: dict, x, heads, eps=1e-5, keep=None, activation=F.gelu):
    """The layers of a CLIP or SigLIP tower, named as in transformers; `w` begins at the tower."""
    count = 1 + max(int(key.split(".")[2]) for key in w if key.startswith("encoder.layers."))
    for i in range(count):
        x = layer(part(w, f"encoder.layers.{i}."), x, heads, CLIP_NAMES, eps, keep, activation)
    return x


def clip_image_tokens(w: dict, pixels, heads):
    """(B, 1 + patches, width) after the last layer, before the final norm."""
    x = patches(w, "embeddings.patch_embedding", pixels)
    first = w["embeddings.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + w["embeddings.position_embedding.weight"]
    return clip_layers(w, norm(w, "pre_layrnorm", x, 1e-5), heads)


def clip_text_tokens(w: dict, ids, heads):
    """(B, L, width) after the final norm; each token sees those before it."""
    x = w["embeddings.token_embedding.weight"][ids] + w["embeddings.position_embedding.weight"][: ids.shape[1]]
    causal = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    return norm(w, "final_layer_norm", clip_layers(w, x, heads, keep=causal), 1e-5)


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()
