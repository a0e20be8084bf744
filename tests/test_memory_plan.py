"""What the planner works out without storage is what the parts keep when they run."""

import pytest
import torch
from kept import KeptBytes
from tiny import tiny_conditioning, tiny_pipeline, tiny_transformer

from rlhf.checks import model_card, with_sampling
from rlhf.config import RewardGradientConfig
from rlhf.contentv.wan_decoder import decode_video
from rlhf.host_memory import HostMemory
from rlhf.lora import add_adapter, lora_config
from rlhf.memory_plan import CLIP_TOKENS, plan_memory
from rlhf.setup import latent_shape
from rlhf.speed import Speed, set_up_blocks

CHECKPOINTED = {"gradient_checkpointing": True}
DECODED = {"decode_chunk": 1, "decode_checkpoint": True}


def tiny(**settings):
    pipe = tiny_pipeline()
    pipe.register_modules(transformer=tiny_transformer(num_layers=6))  # the text that enters the first has no gradient
    args = RewardGradientConfig(lora_rank=4, num_frames=33, per_device_train_batch_size=2, **settings)
    card = model_card("", pipe)
    return pipe, with_sampling(args, card["sampling"]), card


@pytest.mark.parametrize(
    "settings", [{"attention_kernel": "flash"}, CHECKPOINTED, CHECKPOINTED | {"keep_attention": True}]
)
def test_a_branch_keeps_what_was_worked_out(settings):
    pipe, args, card = tiny(**settings)
    plan = plan_memory(args, card, 1, 4)
    model = pipe.transformer
    add_adapter(model, lora_config(args), 0)
    set_up_blocks(model, Speed.of(args), torch.device("cpu"))
    latents = torch.randn(2, *latent_shape(pipe, args)).requires_grad_()
    cond = tiny_conditioning(2, CLIP_TOKENS + args.max_sequence_length)
    with KeptBytes(model) as kept:
        (v,) = model(latents, cond.prompt_embeds_BLD, cond.pooled_embeds_BP, torch.ones(2), return_dict=False)
        held = kept.now
        v.sum().backward()
    outside = 6 * latents.numel() * 4  # of blocks: the projection of the latents, the last norm
    small = 0.1 * plan.branch  # modulations of recomputed blocks
    assert plan.branch <= 1.01 * held <= 1.01 * (plan.branch + outside + small)
    assert plan.branch + plan.block == pytest.approx(kept.most, rel=0.2)  # the last block, first to go, is smaller


@pytest.mark.parametrize("frames", [1, 33])
@pytest.mark.parametrize("settings", [{}, DECODED, DECODED | {"decode_caches": "host"}, DECODED | {"decode_chunk": 3}])
def test_the_decoder_keeps_what_was_worked_out(settings, frames):
    pipe, args, card = tiny(**settings)
    plan = plan_memory(args, card, frames, 4)
    latents = torch.randn(2, *latent_shape(pipe, args)).requires_grad_()
    caches = HostMemory("cpu", smallest_bytes=0) if args.decode_caches == "host" else args.decode_caches
    pipe.vae.requires_grad_(False)
    with KeptBytes(pipe.vae) as kept:
        video = decode_video(pipe.vae, latents, frames, args.decode_chunk, args.decode_checkpoint, 0, caches)
        video.sum().backward()
    beside = video.numel() * 4 if args.decode_checkpoint else 0  # not kept by autograd, but there
    assert plan.decoder - beside == pytest.approx(kept.most, rel=0.12)


def test_settings_lower_what_they_are_for():
    plans = {}
    for name, settings in {
        "plain": {},
        "stepwise": {"stepwise_backward": True},
        "blocks": CHECKPOINTED,
        "attention": CHECKPOINTED | {"keep_attention": True},
        "host": CHECKPOINTED | {"offload_activations": True},
        "streamed": CHECKPOINTED | {"stream_weights": True},
        "bits": {"base_bits": 4},
        "together": {"guidance_together": True},
    }.items():
        _, args, card = tiny(num_grad_steps=2, **settings)
        plans[name] = plan_memory(args, card, 33, 4)
    plain = plans["plain"]
    assert plain.window == 2 * 2 * plain.branch
    assert plain.most == plain.transformer + plain.window + plain.decoder
    assert plans["stepwise"].window == 0
    assert plans["stepwise"].most < plain.most
    assert plans["blocks"].branch < plans["attention"].branch < plain.branch
    assert plans["attention"].block < plans["blocks"].block
    assert plans["host"].branch <= plans["blocks"].branch
    assert plans["bits"].transformer < 0.4 * plain.transformer
    assert plans["streamed"].transformer != plain.transformer
    assert plans["together"].branch == 2 * plain.branch


def test_the_whole_video_of_contentv_8b_on_one_card():
    """What the settings of configs/contentv_8b_all_frames.yaml are for, worked out: no weights are loaded."""
    exact = CHECKPOINTED | DECODED | {"keep_attention": True, "stepwise_backward": True, "decode_caches": "host"}
    args = RewardGradientConfig(model="ByteDance/ContentV-8B", lora_rank=32, vae_dtype="bfloat16", **exact)
    card = model_card(args.model)
    plan = plan_memory(with_sampling(args, card["sampling"]), card, 125, 2)
    assert 30 < plan.most / 2**30 < 34
    assert plan.decoder / 2**30 < 4
    stock = RewardGradientConfig(model="ByteDance/ContentV-8B", lora_rank=32, vae_dtype="bfloat16")
    plain = plan_memory(with_sampling(stock, card["sampling"]), card, 125, 2)
    assert plain.decoder / 2**30 > 80
    assert plain.window / 2**30 > 200
