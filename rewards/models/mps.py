"""MPS: multi-dimensional human preference for an image given its prompt (CVPR 2024).

Paper: "Learning Multi-Dimensional Human Preference for Text-to-Image Generation". Image patches of
a CLIP ViT-H/14 attend to the prompt tokens that are related to a fixed condition. Source:
Kwai-Kolors/MPS, trainer/models/clip_model.py and cross_modeling.py. The cross-model is
reimplemented here; `RENAMED` maps the published keys.

Shape legend: N frames of all videos that are scored, C channels, H height, W width, I image tokens,
L text tokens, P width of the joint embedding, K attention heads, D width of one head.
"""

import torch
import torch.nn.functional as F

from rewards.common.base import FrameReward
from rewards.common.clip_models import CLIP_H14, SIZES, TransformersClip, l2_normalize, learned_scale, openai_tokenizer
from rewards.common.preprocess import preprocess
from rewards.common.weights import build_from_state_dict, load_published_weights, load_tokenizer, rename_keys

REPOSITORY, FILE = "RE-N-Y/mpsv1", "model.safetensors"
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
CROSS = {"layers": 4, "width": 1024, "heads": 16, "head_width": 64}


class MpsModel(torch.nn.Module):
    """A CLIP with a cross-model on top.

    clip   settings of transformers' CLIPConfig; None: the published ones
    cross  settings of the cross-model (layers, width, heads, head_width); None: the published ones
    """

    def __init__(self, clip: dict | None = None, cross: dict | None = None):
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        cross = dict(cross or CROSS)
        layers = range(cross.pop("layers"))
        self.model = CLIPModel(CLIPConfig(**(clip or SIZES[CLIP_H14])))
        self.cross_model = torch.nn.Module()
        self.cross_model.layers = torch.nn.ModuleList(CrossLayer(**cross) for _ in layers)

    def text_tokens(self, ids_NL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return projected tokens (N, L, P) and the projected end-of-text token (N, P)."""
        out = self.model.text_model(input_ids=ids_NL)  # no attention mask, as published
        return self.model.text_projection(out.last_hidden_state), self.model.text_projection(out.pooler_output)

    def forward(self, pixels_NCHW: torch.Tensor, text_NLP: torch.Tensor, keep_NL: torch.Tensor) -> torch.Tensor:
        """Return the class token (N, P) of each image after cross-attention to the kept tokens."""
        tokens = self.model.vision_model(pixel_values=pixels_NCHW).last_hidden_state  # without the final layer norm
        x_NIP = self.model.visual_projection(tokens)
        for layer in self.cross_model.layers:
            x_NIP = layer(x_NIP, text_NLP, keep_NL)
        return x_NIP[:, 0]


class Mps(FrameReward):
    """Mean over frames of exp(logit_scale) * cosine of prompt and prompt-aware image.

    Token i of a prompt is kept if s_i > mask_threshold: s_i is its largest product with a token of
    the condition, divided by the largest s of the prompt. The published code divides by the largest
    s of the batch, which makes scores depend on batch neighbours. For single prompts, as the
    authors score, both agree.

    checkpoint      path of model.safetensors of RE-N-Y/mpsv1 or of MPS_overall.pth, or an MpsModel;
                    None: the former from the hub, 4.4 GB. The authors' own download is a pickled
                    module, which is refused
    tokenizer       of the CLIP: hub id, folder, or a tokenizer
    mask_threshold  .01 as in training and README; the authors' evaluation scripts use .3
    options         settings of FrameReward

    Raises RewardError for weights that are missing, of another layout, or a pickled module.
    """

    name = "mps"

    def __init__(
        self, checkpoint: str | MpsModel | None = None, tokenizer=CLIP_H14, mask_threshold: float = 0.01, **options
    ):
        super().__init__(**options)
        self.tokenizer = load_tokenizer(self.name, tokenizer)
        self.mask_threshold = mask_threshold
        loaded = isinstance(checkpoint, MpsModel)
        self.mps = checkpoint if loaded else self._load(checkpoint)
        self.scale = learned_scale(self.mps.model)
        self.mps.to(self.dtype)
        self.size = self.mps.model.config.vision_config.image_size
        self.freeze()

    def _load(self, path: str | None) -> MpsModel:
        """Load the model from a checkpoint; None: the published file."""
        cure = f"use {FILE} of {REPOSITORY}, or MPS_overall.pth, the state dict of the same weights"
        state = rename_keys(load_published_weights(self.name, path, REPOSITORY, FILE, cure), RENAMED, UNUSED)
        return build_from_state_dict(self.name, path or FILE, MpsModel, state)

    @classmethod
    def random_init(cls, **options) -> "Mps":
        """Build the reward at full size with random weights on torch's default device."""
        return cls(MpsModel(), openai_tokenizer, **options)

    def encode_text(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return tokens (N, L, P), a mask of kept ones (N, L) and unit embeddings (N, P)."""
        length = self.mps.model.config.text_config.max_position_embeddings
        texts = [CONDITION, *prompts]
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        text_NLP, end_NP = self.mps.text_tokens(tokens.input_ids.to(self.device))
        keep_NL = tokens_to_keep(text_NLP[1:].float(), text_NLP[0].float(), self.mask_threshold)
        return text_NLP[1:], keep_NL, l2_normalize(end_NP[1:])

    def score_frames(
        self, frames_NCHW: torch.Tensor, text_NLP: torch.Tensor, keep_NL: torch.Tensor, end_NP: torch.Tensor
    ) -> torch.Tensor:
        """Return scaled cosines (N,) of frames in [0, 1] with their text, by `encode_text`."""
        pixels_NCHW = preprocess(frames_NCHW, self.size, fit=TransformersClip.fit).to(self.dtype)
        image_NP = self.mps(pixels_NCHW, text_NLP, keep_NL)
        return self.scale.to(end_NP.device) * (l2_normalize(image_NP) * end_NP).sum(-1)


def tokens_to_keep(text_NLP: torch.Tensor, condition_LP: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return a mask (N, L): tokens whose condition product exceeds threshold * the maximum."""
    s_NL = (text_NLP @ condition_LP.T).amax(-1)
    return s_NL / s_NL.amax(1, keepdim=True) > threshold


# ---------------------------------------------------------------- the cross-model


class CrossLayer(torch.nn.Module):
    """Cross-attention of image to text tokens, then self-attention; both residual."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.cross = CrossAttention(width, heads, head_width)
        self.block = ParallelBlock(width, heads, head_width)

    def forward(self, x_NIP, text_NLP, keep_NL):
        """Return image tokens (N, I, P) after both attentions."""
        x_NIP = x_NIP + self.cross(x_NIP, text_NLP, keep_NL)
        return x_NIP + self.block(x_NIP)


class CrossAttention(torch.nn.Module):
    """Multi-query cross-attention, in parallel with a gated feed-forward."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        linear, self.heads = torch.nn.Linear, heads
        self.norm = torch.nn.LayerNorm(width)
        self.to_q = linear(width, heads * head_width, bias=False)
        self.to_kv = linear(width, 2 * head_width, bias=False)
        self.to_out = linear(heads * head_width, width, bias=False)
        self.ff = torch.nn.Sequential(
            linear(width, 8 * width, bias=False), SwiGlu(), linear(4 * width, width, bias=False)
        )

    def forward(self, x_NIP, text_NLP, keep_NL):
        """Return the residual (N, I, P) of cross-attention and feed-forward."""
        x_NIP = self.norm(x_NIP)
        q_NIKD = self.to_q(x_NIP).unflatten(-1, (self.heads, -1))
        k_NLD, v_NLD = self.to_kv(text_NLP).chunk(2, dim=-1)
        return self.to_out(attend(q_NIKD, k_NLD, v_NLD, keep_NL[:, None, None])) + self.ff(x_NIP)


class ParallelBlock(torch.nn.Module):
    """Rotary self-attention in parallel with a gated feed-forward (as in GPT-J)."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.heads, self.parts = heads, (heads * head_width, head_width, head_width, 8 * width)
        self.norm = torch.nn.LayerNorm(width)
        self.fused_attn_ff_proj = torch.nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = torch.nn.Linear(heads * head_width, width, bias=False)
        self.ff_out = torch.nn.Sequential(SwiGlu(), torch.nn.Linear(4 * width, width, bias=False))

    def forward(self, x_NIP):
        """Return the residual (N, I, P) of self-attention and feed-forward."""
        q, k_NID, v_NID, ff = self.fused_attn_ff_proj(self.norm(x_NIP)).split(self.parts, dim=-1)
        q_NIKD, k_NID = rotate(q.unflatten(-1, (self.heads, -1))), rotate(k_NID[:, :, None])[:, :, 0]
        return self.attn_out(attend(q_NIKD, k_NID, v_NID)) + self.ff_out(ff)


class SwiGlu(torch.nn.Module):
    """The activation a * SiLU(b) of two halves a, b."""

    def forward(self, x):
        """Return a * SiLU(b), where a and b are the halves of x."""
        x, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * x


def attend(
    q_NIKD: torch.Tensor, k_NLD: torch.Tensor, v_NLD: torch.Tensor, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Return multi-query attention (N, I, K * D): all heads share keys and values."""
    heads = q_NIKD.shape[2]
    k_NKLD, v_NKLD = (x[:, None].expand(-1, heads, -1, -1) for x in (k_NLD, v_NLD))
    out_NKID = F.scaled_dot_product_attention(q_NIKD.transpose(1, 2), k_NKLD, v_NKLD, attn_mask=keep)
    return out_NKID.transpose(1, 2).flatten(2)


def rotate(x_NIKD: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embedding over the second axis (RoPE, arXiv 2104.09864)."""
    length, half = x_NIKD.shape[1], x_NIKD.shape[3] // 2
    exact = torch.promote_types(x_NIKD.dtype, torch.float32)
    place, pair = (torch.arange(n, dtype=exact, device=x_NIKD.device) for n in (length, half))
    angle_I1D = (place[:, None] * 10000 ** (-pair / half))[:, None]
    cos, sin = angle_I1D.cos().to(x_NIKD.dtype), angle_I1D.sin().to(x_NIKD.dtype)
    a, b = x_NIKD.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


# ---------------------------------------------------------------- loading


# RE-N-Y/mpsv1 prefixes every key with "mps.". Positions and rotary frequencies are computed here.
RENAMED = {"mps.": "", ".0.fn.": ".cross.", ".1.fn.": ".block."}
UNUSED = ("position_ids", "inv_freq")
