"""Random, seeded, tiny parts of the real classes: 0.1 s and 0.3 million weights a pipeline."""

import torch
import transformers
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler

from rlhf.contentv.pipeline import ContentVPipeline, SamplingDefaults
from rlhf.contentv.transformer import SD3Transformer3DModel
from rlhf.types import Conditioning

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
MAX_TOKENS = 24
TEXT_WIDTH = 32  # T5; the two CLIP encoders are half as wide each, so that the pooled text is as wide too
SAMPLING = SamplingDefaults(
    height=32,
    width=48,
    num_frames=9,
    num_inference_steps=4,
    guidance_scale=3.0,
    fps=8,
    max_sequence_length=MAX_TOKENS,
)


def tiny_transformer(seed: int = 0, **sizes) -> SD3Transformer3DModel:
    """Two blocks, two heads of 16. Biases and modulations are random: zeros would hide mistakes."""
    sizes = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": TEXT_WIDTH,
    } | sizes
    return draw(SD3Transformer3DModel(**sizes), seed)


def tiny_vae(seed: int = 0, **sizes) -> AutoencoderKLWan:
    """Wan2.1 VAE of base width 4 with its real latent statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(**({"base_dim": 4, "num_res_blocks": 1} | sizes))
    return vae.requires_grad_(False).eval()


def tiny_pipeline(seed: int = 0) -> ContentVPipeline:
    """All of ContentV on the CPU, in float32 and evaluation mode, with a vocabulary of letters."""
    clip, clip_2, t5 = _clip_tokenizer(), _clip_tokenizer(), t5_tokenizer()
    pipe = ContentVPipeline(
        transformer=tiny_transformer(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(seed),
        text_encoder=draw(transformers.CLIPTextModelWithProjection(_clip_config(clip)), seed + 1),
        tokenizer=clip,
        text_encoder_2=draw(transformers.CLIPTextModelWithProjection(_clip_config(clip_2)), seed + 2),
        tokenizer_2=clip_2,
        text_encoder_3=draw(transformers.T5EncoderModel(transformers.T5Config(**t5_sizes(t5))), seed + 3),
        tokenizer_3=t5,
    )
    pipe.sampling = SAMPLING
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_conditioning(batch: int = 1, tokens: int = 6, seed: int = 0, dtype=torch.float32) -> Conditioning:
    """Random embeddings of the tiny transformer's width, negative ones included."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, tokens, TEXT_WIDTH), (batch, TEXT_WIDTH)] * 2
    return Conditioning(*(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes))


def draw(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        scale = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.1
        shift = 1.0 if weight.ndim == 1 and weight.detach().mean() > 0.5 else 0.0  # norm weights stay around one
        weight.data = shift + scale * torch.randn(weight.shape, generator=generator)
    return module.requires_grad_(False).eval()


def _clip_tokenizer() -> transformers.CLIPTokenizer:
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    vocab = {word: number for number, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=MAX_TOKENS)


def t5_tokenizer() -> transformers.T5TokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    vocab = [(piece, 0.0 if piece.startswith("<") else -2.0) for piece in pieces]
    return transformers.T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=MAX_TOKENS)


def _clip_config(tokenizer) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH // 2,
        intermediate_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH // 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_sizes(tokenizer) -> dict:
    return dict(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=TEXT_WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
